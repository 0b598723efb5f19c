"""Training a process reward model: cross-entropy at the steps' ends, on labels of first wrong steps.

A step before the first wrong one is right, that one is wrong, and what comes after it has no label, as in Lightman et
al. 2023, "Let's Verify Step by Step" (arXiv 2305.20050). A record with soft labels has the chance that a step is right
in the place of these, as in the soft estimation of Wang et al. 2023, "Math-Shepherd" (arXiv 2312.08935):
-w1 y log p - w0 (1 - y) log(1 - p), over the sum of the weights w1 y + w0 (1 - y). Right steps are many and wrong ones
few: w makes each class count as much as the other. The result is a token classifier that `PRM` and `transformers` alone
can load.
"""

from __future__ import annotations

import json
import math
import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefixloss import check
from prefixloss.detect.cost import Cost
from prefixloss.detect.evaluate import Scores
from prefixloss.detect.models.batches import first_below
from prefixloss.detect.models.reading import Marked, Reader, device_of, most_tokens, padded
from prefixloss.detect.records import Record
from prefixloss.io.files import write_whole_directory

THRESHOLDS = tuple(number / 20 for number in range(1, 20))
_WARM = 0.1  # the share of the steps over which the learning rate rises; it then falls in a line


@dataclass(frozen=True)
class Settings:
    """separator, system: as in `PRM`. held_out: the share of the problems that is kept for the report. batch_size:
    responses a step. max_tokens: longer responses are left out; None stands for the model's own limit."""

    separator: str = "<extra_0>"
    system: str | None = None
    epochs: int = 2
    batch_size: int = 16
    lr: float = 1e-5
    held_out: float = 0.1
    max_tokens: int | None = None
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens: got {self.max_tokens}, expected at least 1")
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


class Trained(NamedTuple):
    """What came of it, on the problems that were held out. left_out: responses longer than the model takes.
    loss: for each epoch. best: the epoch that was kept, from 0. threshold: the best one of `by_threshold`."""

    training: int
    left_out: int
    loss: list[float]
    best: int
    threshold: float
    by_threshold: dict[float, Scores]


def split(records: Sequence[Record], share: float) -> tuple[list[Record], list[Record]]:
    """Training and held-out records, by the checksums of their problems: no problem is in both."""
    problems = sorted({r.problem for r in records}, key=lambda p: (zlib.crc32(p.encode("utf-8", "replace")), p))
    if len(problems) < 2:
        raise ValueError(f"records: got {len(problems)} different problems, expected at least 2")
    held_out = set(problems[: min(max(1, round(share * len(problems))), len(problems) - 1)])
    return [r for r in records if r.problem not in held_out], [r for r in records if r.problem in held_out]


def train_prm(
    records: Sequence[Record],
    base: str,
    out: Path,
    settings: Settings = Settings(),
    begun: Callable[[int], None] = lambda steps: None,
    advance: Callable[[float], None] = lambda loss: None,
) -> Trained:
    """Trains a token classifier with the body of `base`, a causal LM or any other, and saves it in `out`, a new
    directory, with report.json beside it.

    records: labelled (see `records`). begun: told how many steps there will be; advance: the loss after each.
    ValueError: a record without a label, one kind of step only, too few problems, or no response that fits.
    """
    if any(record.label is None for record in records):
        raise ValueError("records: got one without a label, expected labels of the first wrong step")
    torch.manual_seed(settings.seed)
    model, tokenizer = _base(base, settings)
    made = [
        [example for record in part if (example := _example(record, model, tokenizer, settings)) is not None]
        for part in split([record for record in records if record.steps], settings.held_out)
    ]
    training, held_out = made
    if not training or not held_out:
        raise ValueError(f"max_tokens: no response of {'training' if not training else 'the held-out ones'} fits")
    weights = _balance(training).to(model.device)
    begun(settings.epochs * -(-len(training) // settings.batch_size))
    losses, best, kept = [], 0, {}
    for epoch in _epochs(model, training, weights, settings, advance):
        losses.append(_loss_of(model, held_out, weights, settings.batch_size))
        if losses[epoch] <= losses[best]:
            best, kept = epoch, {name: value.detach().clone() for name, value in model.state_dict().items()}
    model.load_state_dict(kept)
    by_threshold = _scores(model, held_out, settings.batch_size)
    threshold = best_threshold(by_threshold)
    model.config.prefixloss_threshold = threshold
    trained = Trained(len(training), len(records) - sum(map(len, made)), losses, best, threshold, by_threshold)
    write_whole_directory(out, lambda folder: _save(folder, model, tokenizer, trained))
    return trained


def best_threshold(by_threshold: Mapping[float, Scores]) -> float:
    """The one with the best F1, or with the most exact verdicts where all responses are of one kind and there is no
    F1; of equally good ones that nearest to 1/2."""

    def worth(threshold: float) -> tuple[float, float]:
        scores = by_threshold[threshold]
        return scores.share("exact") if scores.f1 is None else scores.f1, -abs(threshold - 0.5)

    return max(by_threshold, key=worth)


def _base(name: str, settings: Settings) -> tuple[Any, Any]:
    """A model with a new head for two labels, and a tokenizer that knows the separator as one token."""
    from transformers import AutoModelForTokenClassification, AutoTokenizer  # noqa: PLC0415

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForTokenClassification.from_pretrained(name, num_labels=2, dtype=torch.float32)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"model: cannot load {name!r} as a token classifier: {reason}") from None
    if len(Reader(tokenizer).known(settings.separator)) != 1:
        tokenizer.add_special_tokens({"additional_special_tokens": [settings.separator]})
        model.resize_token_embeddings(len(tokenizer))
    return model.to(device_of(settings.device)), tokenizer


def _example(record: Record, model: Any, tokenizer: Any, settings: Settings) -> Example | None:
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


def _balance(examples: Sequence[Example]) -> Tensor:
    """float [2]: weights under which each class counts as much as the other."""
    known = [label for example in examples for label in example.labels if label is not None]
    counts = [len(known) - math.fsum(known), math.fsum(known)]
    if not all(counts):
        got = f"{counts[0]:g} wrong and {counts[1]:g} right steps"
        raise ValueError(f"records: got {got} to train on, expected both kinds")
    return torch.tensor([sum(counts) / (2 * count) for count in counts])


def _epochs(
    model: Any, examples: list[Example], weights: Tensor, settings: Settings, advance: Callable[[float], None]
) -> Iterator[int]:
    """Trains, and yields the number of each epoch after it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.0)
    total = settings.epochs * -(-len(examples) // settings.batch_size)
    done = 0
    for epoch in range(settings.epochs):
        model.train()
        order = random.Random(f"{settings.seed} {epoch}").sample(examples, len(examples))
        for start in range(0, len(order), settings.batch_size):
            done += 1
            rate = min(done / max(1.0, _WARM * total), (total - done + 1) / total)
            optimizer.param_groups[0]["lr"] = settings.lr * rate
            loss = _loss(model, order[start : start + settings.batch_size], weights)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            advance(loss.item())
        yield epoch


def _logits(model: Any, batch: Sequence[Example]) -> Tensor:
    """float [steps, 2], at the ends of all steps of a batch."""
    ids, mask = padded([example.marked.ids for example in batch], model.device)
    logits = model(input_ids=ids, attention_mask=mask).logits
    return torch.cat([logits[row, example.marked.ends] for row, example in enumerate(batch)])


def _loss(model: Any, batch: Sequence[Example], weights: Tensor) -> Tensor:
    labels = [label for example in batch for label in example.labels]
    known = [k for k, label in enumerate(labels) if label is not None]
    right = torch.tensor([labels[k] for k in known], device=model.device)
    return cross_entropy(_logits(model, batch)[known], right, weights)


def cross_entropy(logits: Tensor, right: Tensor, weights: Tensor) -> Tensor:
    """0-d. logits: [n, 2], of wrong and of right; right: float [n], from 0 to 1; weights: [2], of the two."""
    counted = weights * torch.stack([1 - right, right], -1)
    return -(counted * logits.log_softmax(-1)).sum() / counted.sum()


@torch.no_grad()
def _loss_of(model: Any, examples: Sequence[Example], weights: Tensor, batch_size: int) -> float:
    """The mean over batches, by their labelled steps."""
    model.eval()
    total = steps = 0.0
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        known = sum(label is not None for example in batch for label in example.labels)
        total += known * _loss(model, batch, weights).item()
        steps += known
    return total / steps


@torch.no_grad()
def _scores(model: Any, examples: Sequence[Example], batch_size: int) -> dict[float, Scores]:
    """On held-out responses, by threshold."""
    model.eval()
    rewards: list[list[float]] = []
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        right = _logits(model, batch).double().softmax(-1)[:, 1].split([len(e.labels) for e in batch])
        rewards += [r.tolist() for r in right]
    labels = [-1 if example.record.label is None else example.record.label for example in examples]
    steps = sum(len(example.labels) for example in examples)
    return {t: Scores(labels, [first_below(r, t) for r in rewards], steps, 0.0, Cost()) for t in THRESHOLDS}


def _save(folder: Path, model: Any, tokenizer: Any, trained: Trained) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    chosen = trained.by_threshold[trained.threshold]
    report = {
        "training_responses": trained.training,
        "held_out_responses": len(chosen.labels),
        "left_out": trained.left_out,
        "held_out_loss": trained.loss,
        "epoch": trained.best + 1,
        "threshold": trained.threshold,
        "f1_by_threshold": {f"{t:g}": scores.f1 for t, scores in trained.by_threshold.items()},
        "calibration_error": chosen.calibration_error(),
        "reliability": [b._asdict() for b in chosen.reliability()],
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
