"""Results on disk: written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prefixloss.io.files import write_whole


def write_json(path: Path, record: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: file.write((json.dumps(record, indent=1) + "\n").encode()))
