#!/usr/bin/env bash
# The Megatron tests on the newest supported megatron-core, which needs Python 3.12; CI has 3.11 and megatron-core 0.16.1.
# Makes an environment of its own beside .venv. Arguments go to pytest.
#   BOOTSTRAP_PYTHON=python3.12 scripts/test_megatron_latest.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/own_env.sh
own_env "${MEGATRON_ENV:-.venv-megatron-latest}" "${BOOTSTRAP_PYTHON:-python3.12}" 12
install "megatron-core>=0.19,<0.20" -e ".[megatron,launch]" pytest pytest-xdist absl-py
install --no-deps megatron-fsdp==0.6.1
install --no-deps emerging-optimizers==0.3.0  # of which Megatron makes Muon
"$PYTHON" -c 'import megatron.core, torch; print("megatron-core", megatron.core.__version__, "torch", torch.__version__)'
exec "$PYTHON" -m pytest tests/mcore -n "${TEST_WORKERS:-2}" --dist loadfile -p no:cacheprovider "$@"
