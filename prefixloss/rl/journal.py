"""What a run writes down as it goes: its settings, and a line of figures an update."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prefixloss.check import UsageError
from prefixloss.io import settings
from prefixloss.io.files import write_whole
from prefixloss.io.lock import clear


def open_run(run: Path, config: dict[str, Any], overwrite: bool = False) -> None:
    """Make the run's directory with its config.json. UsageError where that is not possible."""
    try:
        if overwrite and run.exists():
            clear(run)
        run.mkdir(parents=True, exist_ok=True)
        settings.write(run / "config.json", config)
    except OSError as error:
        raise UsageError(f"--out: cannot write to {run}: {error.strerror}") from None


def metrics_line(metrics: dict[str, Any]) -> str:
    return json.dumps(metrics) + "\n"


def append_metrics(path: Path, metrics: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(metrics_line(metrics))


def rewrite_metrics(path: Path, history: list[dict[str, Any]]) -> None:
    """Drop the lines of updates that came after the checkpoint, a torn last line included."""
    write_whole(path, lambda file: file.write("".join(map(metrics_line, history)).encode()))
