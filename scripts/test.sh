#!/usr/bin/env bash
# The whole test suite. Does its own set-up on a fresh machine; arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" dev
exec "$PYTHON" -m pytest -n "${TEST_WORKERS:-2}" --dist loadfile "$@"
