#!/usr/bin/env bash
# The Megatron tests on the newest supported megatron-core, which needs Python 3.12; CI has 3.11 and megatron-core 0.16.1.
# Makes an environment of its own beside .venv. Arguments go to pytest.
#   BOOTSTRAP_PYTHON=python3.12 scripts/test_megatron_latest.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${BOOTSTRAP_PYTHON:-python3.12}"
env="${MEGATRON_ENV:-.venv-megatron-latest}"
if [ ! -x "$env/bin/python" ]; then
  "$python" -c 'import sys; assert sys.version_info >= (3, 12), sys.version' || {
    echo "needs Python 3.12 or newer: BOOTSTRAP_PYTHON=/path/to/python3.12 $0" >&2
    exit 2
  }
  "$python" -m venv "$env"
fi
"$env/bin/python" -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' scripts/constraints.txt)"
"$env/bin/python" -m pip install --quiet --disable-pip-version-check "megatron-core>=0.19,<0.20" -e ".[megatron,launch]" \
  pytest pytest-xdist
"$env/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps megatron-fsdp==0.6.1
# Megatron makes Muon of a package that is installed from its repository.
"$env/bin/python" -m pip install --quiet --disable-pip-version-check absl-py \
  && "$env/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
    "emerging-optimizers @ git+https://github.com/NVIDIA-NeMo/Emerging-Optimizers@v0.4.0" \
  || echo "emerging-optimizers cannot be installed: the tests of Muon run on their stand-in for it" >&2
"$env/bin/python" -c 'import megatron.core, torch; print("megatron-core", megatron.core.__version__, "torch", torch.__version__)'
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$env/bin/python" -m pytest tests/mcore -n "${TEST_WORKERS:-2}" --dist loadfile -p no:cacheprovider "$@"
