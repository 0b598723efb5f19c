"""What a run was begun with: its config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefixloss.check import UsageError
from prefixloss.io.files import write_whole


def write(path: Path, values: Mapping[str, Any]) -> None:
    text = json.dumps(values, indent=2) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


def read(path: Path, missing: str) -> dict[str, Any]:
    """UsageError where it is not what `write` makes; missing: the message where there is none to read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise UsageError(f"--resume: {missing}") from None
    if not isinstance(values, dict):
        raise UsageError(f"--resume: {path} holds no settings")
    return values
