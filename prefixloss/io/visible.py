"""Text that others wrote, as a terminal or a page may show it: nothing in it moves, colours, hides or turns text round.

Models write what they like, and a terminal obeys escape sequences wherever they come from.
"""

from __future__ import annotations

import re
from typing import Any

_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # controls but tab and newline, ESC and CSI among them
    "\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"  # invisible, or turn text round
    "\U000e0000-\U000e0fff"  # invisible tags
    "\ud800-\udfff]"  # half a character
)


def visible(text: str) -> str:
    """Every character that is no text as one that shows: "\u241b" for an escape, "\ufffd" for what has no picture.

    The length stays the same, but for the end of a line that is written \\r\\n.
    """
    return _UNSEEN.sub(_picture, text.replace("\r\n", "\n"))


def _picture(match: re.Match[str]) -> str:
    code = ord(match[0])
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"


def print_table(console: Any, table: Any) -> None:
    """A table of rich's, as wide as it has to be: where the terminal is narrower its rows wrap, and nothing is cut."""
    narrow = console.width
    wanted = console.measure(table, options=console.options.update(width=1000)).maximum
    try:
        console.width = max(narrow, wanted)
        console.print(table)
    finally:
        console.width = narrow
