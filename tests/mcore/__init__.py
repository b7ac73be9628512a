"""The real megatron-core on CPU and gloo."""
