"""A plugin for axolotl, whose users have a YAML file and no code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

try:
    from axolotl.integrations.base import BasePlugin
    from pydantic import BaseModel
except ImportError:
    raise ImportError("dist_clip.axolotl needs axolotl: see https://docs.axolotl.ai for its installation") from None

from dist_clip.transformers import attach

__all__ = ["ClipArgs", "ClipPlugin"]


class ClipArgs(BaseModel):  # type: ignore[misc, unused-ignore]
    """The key that the plugin adds to axolotl's configuration, which would drop it unread otherwise.

    Attributes:
        dist_clip: the keyword arguments of `dist_clip.transformers.attach`, or a policy's name or text alone.
    """

    dist_clip: dict[str, Any] | str | None = None


class ClipPlugin(BasePlugin):  # type: ignore[misc, unused-ignore]
    """Attaches a clipper to axolotl's trainer, as `dist_clip.transformers.attach` does.

    Example (axolotl's YAML)::

        plugins:
          - dist_clip.axolotl.ClipPlugin
        dist_clip:
          policy: logclip ratio=3 post_max_norm=1
          guard: median

    Without the key ``dist_clip`` it is what `dist_clip.recommended` returns.
    """

    def get_input_args(self) -> str:
        """Return where axolotl finds the schema of the plugin's configuration."""
        return "dist_clip.axolotl.ClipArgs"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Attach the clipper."""
        settings = _plain(cfg.get("dist_clip")) or {}
        attach(trainer, **({"policy": settings} if isinstance(settings, str) else settings))


def _plain(value: Any) -> Any:
    """Return axolotl's dictionaries, which answer None for keys that they lack, as plain ones."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value
