# Sourced by scripts whose packages do not go with the rest, from the project's root:
#   own_env FOLDER PYTHON MINOR
# makes the environment FOLDER if it is missing, by an interpreter that is Python 3.MINOR or newer, with the torch of
# scripts/constraints.txt. Afterwards `install` takes packages into it, and $PYTHON is its interpreter.
own_env() {
  PYTHON="$1/bin/python"
  if [ ! -x "$PYTHON" ]; then
    "$2" -c "import sys; assert sys.version_info >= (3, $3), sys.version" || {
      echo "needs Python 3.$3 or newer: BOOTSTRAP_PYTHON=/path/to/python3.$3 $0" >&2
      exit 2
    }
    "$2" -m venv "$1"
  fi
  install "$(grep '^torch==' scripts/constraints.txt)"
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
}
install() { "$PYTHON" -m pip install --quiet --disable-pip-version-check "$@"; }
