"""Clipping for the optimizers of Megatron-core, by a call, by flags, or by a launcher for an unmodified script.

    clipper = dist_clip.megatron.attach(optimizer, dist_clip.LogClip(), model=model_chunks)
    pretrain(..., extra_args_provider=dist_clip.megatron.add_clip_args)      # then attach_from_args
    python -m dist_clip.megatron pretrain_gpt.py --grad-clip-mode logclip ...

See docs/megatron.md.
"""

from dist_clip.megatron.attach import attach
from dist_clip.megatron.flags import add_clip_args, attach_from_args, guards_from_args, policy_from_args
from dist_clip.megatron.layer_norms import log_layer_grad_norms

__all__ = [
    "add_clip_args",
    "attach",
    "attach_from_args",
    "guards_from_args",
    "log_layer_grad_norms",
    "policy_from_args",
]
