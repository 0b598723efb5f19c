"""The state a run resumes from."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prefixloss.files import write_whole
from prefixloss.rl import UsageError


def open_run(run: Path, config: dict[str, Any], overwrite: bool = False) -> None:
    """Make the run's directory with its config.json. UsageError where that is not possible."""
    try:
        if overwrite and run.exists():
            shutil.rmtree(run)
        run.mkdir(parents=True, exist_ok=True)
        write_whole(run / "config.json", lambda file: file.write((json.dumps(config, indent=2) + "\n").encode()))
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


def save(path: Path, state: dict[str, Any]) -> None:
    """A dict of tensors and plain values, together with the state of every random generator."""
    write_whole(path, lambda file: torch.save({**state, "random": random_state()}, file))


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any] | None:
    """What `save` wrote, or None if nothing was; `restore_random` puts the generators back."""
    return torch.load(path, map_location=device, weights_only=True) if path.exists() else None


class Stop:
    """Whether Ctrl-C was pressed: once lets the update finish, so that it can be saved; twice ends at once."""

    asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        def handle(number: int, frame: object) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True

        previous = signal.signal(signal.SIGINT, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)


def random_state() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"]:
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
