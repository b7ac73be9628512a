#!/usr/bin/env bash
# The tests. Does its own set-up on a fresh machine; arguments go to pytest.
#   scripts/test.sh            everything but the pages
#   scripts/test.sh --fast     tests/unit, and one training run each of DDP, FSDP2, TP + FSDP2, a pipeline and Megatron
#                              against a single process: under 90 seconds
#   scripts/test.sh --pages    tables and figures of the documentation against docs/data
#   scripts/test.sh --help     pytest's options; those of this suite are under "dist_clip"
# TEST_WORKERS: how many processes run tests (2). docs/testing.md says more.
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" dev
# Whole files go to a worker, as tests of a file share runs, and in the order of tests/conftest.py: long ones first.
exec "$PYTHON" -m pytest -n "${TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"
