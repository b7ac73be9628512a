# Sourced by the other scripts: makes .venv in the project's root if it is missing and installs the project with the
# extra named in $1, pinned by scripts/constraints.txt. Leaves $PYTHON set to the environment's interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extra="$1"
PYTHON="$PWD/.venv/bin/python"
if [ ! -x "$PYTHON" ]; then
  "${BOOTSTRAP_PYTHON:-python3}" -m venv .venv
fi
# Installing takes seconds when nothing changed, but not zero: a stamp of what was installed skips it.
stamp=".venv/.installed-$extra"
want="$(cat pyproject.toml scripts/constraints.txt | cksum)"
if [ "$(cat "$stamp" 2>/dev/null || true)" != "$want" ]; then
  # torch first and by its exact pin, so that an index or a local wheel chosen for it by the user's pip is used.
  "$PYTHON" -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' scripts/constraints.txt)" -c scripts/constraints.txt
  "$PYTHON" -m pip install --quiet --disable-pip-version-check -c scripts/constraints.txt -e ".[$extra]"
  # Tests attach to timm's optimizers, which need torch alone. Its models need a torchvision built for this very torch.
  [ "$extra" != dev ] || "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps -c scripts/constraints.txt timm
  echo "$want" > "$stamp"
fi
# Multi-process runs on a small machine: one thread a process.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHON
