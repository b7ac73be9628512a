#!/usr/bin/env bash
# Builds the documentation site into build/website/site; a warning is an error. Open index.html there, or
#   scripts/docs.sh --serve     builds it and serves it at http://localhost:8000
# Makes an environment of its own beside .venv: the site needs neither torch nor dist_clip installed.
#   DOCS_PYTHON=/path/to/python scripts/docs.sh     uses that one, which has to have the packages of the extra "docs"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${DOCS_PYTHON:-.venv-docs/bin/python}"
if [ -z "${DOCS_PYTHON:-}" ]; then
  [ -x "$python" ] || "${BOOTSTRAP_PYTHON:-python3}" -m venv .venv-docs
  stamp=".venv-docs/.installed"
  want="$(cat pyproject.toml scripts/constraints.txt | cksum)"
  if [ "$(cat "$stamp" 2>/dev/null || true)" != "$want" ]; then
    # The packages of the extra alone: dist_clip itself is read from its source, not imported.
    "$python" -c 'import re, sys; print(*re.findall(r"\"([^\"]+)\"", re.search(r"^docs = \[(.*?)\]", open("pyproject.toml").read(), re.M | re.S)[1]), sep="\n")' |
      xargs "$python" -m pip install --quiet --disable-pip-version-check -c scripts/constraints.txt
    echo "$want" > "$stamp"
  fi
fi
out=build/website
"$python" -m scripts.website "$out"
"$python" -m zensical build --strict --clean -f "$out/zensical.toml" 2>&1 | tee "$out/log"
# What the reader of docstrings has to say is no warning of zensical's.
if grep -E '^(griffe|mkdocstrings|mkdocs_autorefs)\b' "$out/log"; then
  echo "a docstring is not as griffe reads it: see above" >&2
  exit 1
fi
[ "${1:-}" != --serve ] || exec "$python" -m http.server 8000 --bind localhost -d "$out/site"
