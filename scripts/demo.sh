#!/usr/bin/env bash
# Watch clipping at work: a small GPT trained with GlobalGC, with the recommended setting and with AdaGC (median), each
# with and without the same injected fault.
# Does its own set-up on a fresh machine. The table and the plot are made from the runs' logs (runs/demo).
#   SEED=1 OUT=runs/demo-1 scripts/demo.sh      another seed
#   scripts/demo.sh --fault batch --fault-steps 12      another fault (any option of launch/train.py)
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" launch
out="${OUT:-runs/demo}"
seed="${SEED:-0}"
started=$SECONDS

# The settings of every run. They, and the fault, were chosen because they separate the rules; see launch/README.md.
common=(--device cpu --parallel ddp --dim 64 --layers 2 --heads 4 --seq-len 128 --batch-size 8 --steps 220
  --lr 3e-3 --lr-warmup-steps 50 --schedule constant --betas 0.9 0.999 --seed "$seed")
fault=(--fault grad --fault-tensor blocks.0.attn.wq.weight --fault-step 160 --fault-steps 20 --fault-scale 1e4 "$@")

train() { # name, then options
  local name="$1"
  shift
  echo "== $name"
  "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 -m launch.train \
    "${common[@]}" --out "$out/$name" "$@"
}

train global --clip global
train global-fault --clip global "${fault[@]}"
train recommended --clip recommended
train recommended-fault --clip recommended "${fault[@]}"
train adagc --clip adagc --adagc-gamma-init median
train adagc-fault --clip adagc --adagc-gamma-init median "${fault[@]}"

"$PYTHON" -m launch.compare "$out"
echo "trained and compared in $((SECONDS - started)) s; TensorBoard: .venv/bin/tensorboard --logdir $out"
