"""An update's figures sent to a tracker: tensorboard, wandb or trackio, each through its own package."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

Log = Callable[[dict[str, Any]], None]  # an update's line of metrics.jsonl

PROJECT = "prefixloss"


@contextmanager
def opened(name: str | None, run: Path, settings: dict[str, Any], update: int) -> Iterator[Log]:
    """What takes the figures, until it is closed. name: None for none. update: the last one that was done before, which
    tensorboard forgets the later ones for: they are made again.
    """
    if name is None:
        yield lambda metrics: None
    elif name == "tensorboard":
        writer = import_module("torch.utils.tensorboard").SummaryWriter(str(run / name), purge_step=update + 1)
        try:
            yield lambda metrics: _scalars(writer, metrics)
        finally:
            writer.close()
    else:
        tracker: Any = import_module(name)
        tracker.init(project=PROJECT, name=run.name, config=settings)
        try:
            yield lambda metrics: tracker.log(metrics, step=metrics["update"])
        finally:
            tracker.finish()


def _scalars(writer: Any, metrics: dict[str, Any]) -> None:
    for name, value in metrics.items():
        if name != "update":
            writer.add_scalar(name, value, metrics["update"])
    writer.flush()
