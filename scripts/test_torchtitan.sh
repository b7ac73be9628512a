#!/usr/bin/env bash
# dist_clip in torchtitan's own trainer, on CPUs. CI has no torchtitan: it wants other versions of packages than the
# rest, and Python 3.11. Makes an environment of its own beside .venv. Arguments go to pytest.
#   BOOTSTRAP_PYTHON=python3.12 scripts/test_torchtitan.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${BOOTSTRAP_PYTHON:-python3}"
env="${TORCHTITAN_ENV:-.venv-torchtitan}"
if [ ! -x "$env/bin/python" ]; then
  "$python" -c 'import sys; assert sys.version_info >= (3, 11), sys.version' || {
    echo "needs Python 3.11 or newer: BOOTSTRAP_PYTHON=/path/to/python3.11 $0" >&2
    exit 2
  }
  "$python" -m venv "$env"
fi
"$env/bin/python" -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' scripts/constraints.txt)"
# triton: torchtitan imports it, and torch for CPUs does not bring it.
"$env/bin/python" -m pip install --quiet --disable-pip-version-check "torchtitan==0.3.0" triton -e . pytest
"$env/bin/python" -c 'import importlib.metadata as m; print(*(f"{p} {m.version(p)}" for p in ("torchtitan", "torch")))'
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$env/bin/python" -m pytest tests/adapters/torchtitan tests/adapters/test_torchtitan_contract.py \
  -p no:cacheprovider "$@"
