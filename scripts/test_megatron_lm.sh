#!/usr/bin/env bash
# Megatron-LM's own pretrain_gpt.py, unmodified, with dist_clip, on CPUs: equal to one process and to Megatron's own
# clipping? CI has no Megatron-LM. Makes an environment of its own beside .venv; needs make and g++, with which Megatron
# compiles a helper inside the checkout. Arguments after the checkout go to scripts/megatron_lm.py.
#   BOOTSTRAP_PYTHON=python3.12 scripts/test_megatron_lm.sh ../Megatron-LM
set -euo pipefail
checkout="$(cd "${1:?usage: $0 CHECKOUT [--only NAME ...]}" && pwd)"
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/own_env.sh
own_env "${MEGATRON_LM_ENV:-.venv-megatron-lm}" "${BOOTSTRAP_PYTHON:-python3.12}" 12
# emerging-optimizers: Muon, in the version that Megatron-LM asks for.
install -e ".[launch]" einops psutil packaging pybind11 setuptools emerging-optimizers==0.3.0
exec "$PYTHON" -m scripts.megatron_lm "$checkout" "$@"
