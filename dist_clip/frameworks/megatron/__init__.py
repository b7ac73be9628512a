"""Megatron-core: clipping for every optimizer it has. The public names are those of `dist_clip.megatron`."""
