"""A griffe extension: reads the docstrings of dist_clip as their authors meant them.

griffe knows sections "Examples", and takes "Example:" for a remark whose ">>>" lines would be quotations. Where an entry
has several names ("ratio, power: above 0"), griffe knows none of them.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

ENTRY = re.compile(r"(\s+)(\w+(?:, \w+)+): ")


def read(text: str) -> str:
    """The docstring as griffe understands it."""
    text = re.sub(r"^Example( \(.*\))?:$", "Examples:", text, flags=re.MULTILINE)
    text = re.sub(r":func:`([^`]*)`", r"`\1`", text)
    section, lines = "", []
    for line in text.splitlines():
        if re.fullmatch(r"\w+:", line):
            section = line
        entry = ENTRY.match(line)
        if entry and section == "Raises:":  # kinds of error that share their reason
            line = f"{entry[1]}{entry[2].replace(', ', ' | ')}: {line[entry.end() :]}"
        elif entry and section == "Args:":  # the last of the arguments has the text, the others point to it
            *others, last = entry[2].split(", ")
            lines += [f"{entry[1]}{name}: see `{last}`." for name in others]
            line = f"{entry[1]}{last}: {line[entry.end() :]}"
        lines.append(line)
    return "\n".join(lines)


class Docstrings(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = read(obj.docstring.value)
