"""A griffe extension: reads the docstrings of dist_clip as their authors meant them.

griffe knows sections "Examples", and takes "Example:" for a remark whose ">>>" lines would be quotations.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object


class Docstrings(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        text = re.sub(r"^Example( \(.*\))?:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
        text = re.sub(r":func:`([^`]*)`", r"`\1`", text)
        # Two kinds of error in one entry share their reason.
        obj.docstring.value = re.sub(r"^(\s+)(\w+), (\w+): ", r"\1\2 | \3: ", text, flags=re.MULTILINE)
