"""What a process reward model is trained from: a base with a new head, and labelled responses as its tokens."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from prefixloss import check
from prefixloss.detect.models.reading import Marked, Reader, device_of, most_tokens
from prefixloss.detect.records import Record


@dataclass(frozen=True)
class Settings:
    """separator, system: as in `PRM`. held_out: the share of the problems that is kept for the report. batch_size:
    responses a step. max_tokens: longer responses are left out; None stands for the model's own limit. packing: a row
    holds as many of a step's responses as the longest has room for. save_every: steps between checkpoints."""

    separator: str = "<extra_0>"
    system: str | None = None
    epochs: int = 2
    batch_size: int = 16
    lr: float = 1e-5
    held_out: float = 0.1
    max_tokens: int | None = None
    seed: int = 0
    device: str = "auto"
    packing: bool = False
    save_every: int = 100

    def __post_init__(self) -> None:
        for name, low in (("epochs", 1), ("batch_size", 1), ("max_tokens", 1), ("save_every", 1), ("seed", 0)):
            value = getattr(self, name)
            if not check.is_whole(value, low) and not (name == "max_tokens" and value is None):
                raise ValueError(f"{name}: got {check.describe(value)}, expected a whole number of at least {low}")
        for name in ("separator", "device"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name}: got {check.describe(getattr(self, name))}, expected a text")
        check.flag("packing", self.packing)
        if not self.separator:
            raise ValueError("separator: got '', expected one token")
        check.number("lr", self.lr, 1e-12, 1.0)
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out: got {self.held_out}, expected 0 < held_out < 1")


class Example(NamedTuple):
    """labels: for each step how likely it is right, 1 or 0 where that is known; None behind the first wrong one."""

    marked: Marked
    labels: list[float | None]
    record: Record


def load_base(name: str, settings: Settings) -> tuple[Any, Any]:
    """A model with a new head for two labels, and a tokenizer that knows the separator as one token."""
    from transformers import AutoModelForTokenClassification, AutoTokenizer  # noqa: PLC0415

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForTokenClassification.from_pretrained(name, num_labels=2, dtype=torch.float32)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = check.first_line(error)
        raise ValueError(f"model: cannot load {name!r} as a token classifier: {reason}") from None
    if len(Reader(tokenizer).known(settings.separator)) != 1:
        tokenizer.add_special_tokens({"additional_special_tokens": [settings.separator]})
        model.resize_token_embeddings(len(tokenizer))
    return model.to(device_of(settings.device)), tokenizer


def split(records: Sequence[Record], share: float) -> tuple[list[Record], list[Record]]:
    """Training and held-out records, by the checksums of their problems: no problem is in both."""
    problems = sorted({r.problem for r in records}, key=lambda p: (zlib.crc32(p.encode("utf-8", "replace")), p))
    if len(problems) < 2:
        raise ValueError(f"records: got {len(problems)} different problems, expected at least 2")
    held_out = set(problems[: min(max(1, round(share * len(problems))), len(problems) - 1)])
    return [r for r in records if r.problem not in held_out], [r for r in records if r.problem in held_out]


def examples_of(
    records: Sequence[Record], model: Any, tokenizer: Any, settings: Settings
) -> tuple[list[Example], list[Example]]:
    """Those to train on and the held-out ones, without what is too long or has no steps."""
    training, held_out = (
        [example for record in part if (example := example_of(record, model, tokenizer, settings)) is not None]
        for part in split([record for record in records if record.steps], settings.held_out)
    )
    if not training or not held_out:
        raise ValueError(f"max_tokens: no response of {'training' if not training else 'the held-out ones'} fits")
    return training, held_out


def example_of(record: Record, model: Any, tokenizer: Any, settings: Settings) -> Example | None:
    """None for what is longer than the model takes."""
    reader = Reader(tokenizer)
    mark = reader.known(settings.separator)
    marked = reader.read(record.problem, record.steps, mark, 0, settings.separator, settings.system)
    most = most_tokens(model.config, tokenizer)
    if len(marked.ids) > min(settings.max_tokens or most, most):
        return None
    assert record.label is not None
    first = len(record.steps) if record.label < 0 else record.label
    known = [1.0 if k < first else 0.0 if k == first else None for k in range(len(record.steps))]
    return Example(marked, known if record.chances is None else list(record.chances), record)
