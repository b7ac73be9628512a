"""The command ``python -m dist_clip.megatron SCRIPT ARGS...``; see `dist_clip.megatron.launcher`."""

from dist_clip.megatron.launcher import main

main()
