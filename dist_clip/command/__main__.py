"""``python -m dist_clip.command``, for where the command is not on the path."""

from dist_clip.command.app import main

main()
