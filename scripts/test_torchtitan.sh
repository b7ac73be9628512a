#!/usr/bin/env bash
# dist_clip in torchtitan's own trainer, on CPUs. CI has no torchtitan: it wants other versions of packages than the
# rest, and Python 3.11. Makes an environment of its own beside .venv. Arguments go to pytest.
#   BOOTSTRAP_PYTHON=python3.12 scripts/test_torchtitan.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/own_env.sh
own_env "${TORCHTITAN_ENV:-.venv-torchtitan}" "${BOOTSTRAP_PYTHON:-python3}" 11
# triton: torchtitan imports it, and torch for CPUs does not bring it.
install "torchtitan==0.3.0" triton -e . pytest
"$PYTHON" -c 'import importlib.metadata as m; print(*(f"{p} {m.version(p)}" for p in ("torchtitan", "torch")))'
exec "$PYTHON" -m pytest tests/adapters/torchtitan tests/adapters/test_torchtitan_contract.py -p no:cacheprovider "$@"
