#!/usr/bin/env bash
# A Megatron-core GPT on one node with GPUs: tensor parallelism over 2, ZeRO-1 over the rest, bf16, clipped as recommended.
#   launch/megatron_node.sh                                        (from the project's root, with .venv made)
#   GPUS=4 launch/megatron_node.sh --grad-clip-mode zclip          (options of launch/train_megatron.py)
# Needs the extras launch and megatron, and Transformer Engine, whose layers the model is made of on GPUs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
gpus="${GPUS:-$(nvidia-smi --list-gpus | wc -l)}"
export CUDA_DEVICE_MAX_CONNECTIONS=1 OMP_NUM_THREADS=1
exec .venv/bin/python -m torch.distributed.run --standalone --nproc-per-node "$gpus" -m launch.train_megatron \
  --tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather \
  --num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 1024 --bf16 \
  --micro-batch-size 4 --global-batch-size 64 --train-iters 1000 --lr 6e-4 --lr-warmup-iters 100 \
  --grad-clip-mode recommended \
  --save runs/megatron/ckpt --save-interval 250 --load runs/megatron/ckpt --out runs/megatron "$@"
