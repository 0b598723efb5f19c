"""The training of a process reward model: its loss, its steps, what it is worth on held-out responses, its state."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefixloss.detect.cost import Cost
from prefixloss.detect.evaluate import Scores
from prefixloss.detect.models.batches import first_below
from prefixloss.detect.models.packing import Laid, laid
from prefixloss.detect.prm_examples import Example, Settings
from prefixloss.io import checkpoint

THRESHOLDS = tuple(number / 20 for number in range(1, 20))
_WARM = 0.1  # the share of the steps over which the learning rate rises; it then falls in a line


class Learner:
    """A model, its optimizer and how far they have come. losses: on the held-out responses, an epoch. best, kept: the
    epoch with the lowest, and its weights. read, empty: positions that the model read, and those without a token."""

    def __init__(self, model: Any, training: list[Example], held_out: list[Example], settings: Settings) -> None:
        self.model, self.training, self.held_out, self.settings = model, training, held_out, settings
        self.weights = balance(training).to(model.device)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.0)
        self.steps = self.read = self.empty = self.best = 0
        self.losses: list[float] = []
        self.kept: dict[str, Tensor] = {}

    @property
    def epoch(self) -> int:
        return len(self.losses)

    @property
    def an_epoch(self) -> int:
        """Steps."""
        return -(-len(self.training) // self.settings.batch_size)

    @property
    def total(self) -> int:
        return self.settings.epochs * self.an_epoch

    @property
    def padding(self) -> float:
        return self.empty / self.read

    def batches(self) -> list[list[Example]]:
        """Those of the epoch that are left."""
        order = random.Random(f"{self.settings.seed} {self.epoch}").sample(self.training, len(self.training))
        return _cut(order, self.settings.batch_size)[self.steps - self.epoch * self.an_epoch :]

    def step(self, batch: Sequence[Example]) -> float:
        """Its loss."""
        self.model.train()
        self.steps += 1
        rate = min(self.steps / max(1.0, _WARM * self.total), (self.total - self.steps + 1) / self.total)
        self.optimizer.param_groups[0]["lr"] = self.settings.lr * rate
        inputs = _laid(batch, self.model, self.settings.packing)
        self.read, self.empty = self.read + inputs.inputs["input_ids"].numel(), self.empty + inputs.padding
        loss = _loss(_logits(self.model, inputs), batch, self.weights)
        value = loss.item()
        if not math.isfinite(value):
            raise ValueError(f"lr: got {self.settings.lr:g}, and the loss is {value} in step {self.steps}: lower it")
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return value

    def end_epoch(self) -> None:
        """The mean of the held-out loss over batches, by their labelled steps; the weights, if none were better."""
        total = steps = 0.0
        for batch, logits in self._held_out():
            known = sum(label is not None for example in batch for label in example.labels)
            total += known * _loss(logits, batch, self.weights).item()
            steps += known
        self.losses.append(total / steps)
        if self.losses[-1] <= self.losses[self.best]:
            self.best = self.epoch - 1
            self.kept = {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def scores(self) -> dict[float, Scores]:
        """On held-out responses, by threshold."""
        rewards: list[list[float]] = []
        for batch, logits in self._held_out():
            right = logits.double().softmax(-1)[:, 1].split([len(example.labels) for example in batch])
            rewards += [r.tolist() for r in right]
        labels = [-1 if example.record.label is None else example.record.label for example in self.held_out]
        steps = sum(len(example.labels) for example in self.held_out)
        return {t: Scores(labels, [first_below(r, t) for r in rewards], steps, 0.0, Cost()) for t in THRESHOLDS}

    @torch.no_grad()
    def _held_out(self) -> list[tuple[list[Example], Tensor]]:
        """Batches, with the logits of their steps."""
        self.model.eval()
        batches = _cut(self.held_out, self.settings.batch_size)
        return [(batch, _logits(self.model, _laid(batch, self.model, self.settings.packing))) for batch in batches]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; the rate and the order follow from the steps."""
        return {
            "examples": self._sum(), "settings": asdict(self.settings), "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(), "kept": self.kept,
            **{name: getattr(self, name) for name in ("steps", "read", "empty", "losses", "best")},
        }  # fmt: skip

    def restore(self, saved: dict[str, Any], path: Path) -> None:
        """path: of the checkpoint, for errors."""
        with checkpoint.fitting(path):
            if saved["settings"] != asdict(self.settings):
                raise ValueError("it was made with others")
            if saved["examples"] != self._sum():
                raise ValueError("the labelled responses, or the tokenizer that read them, are other ones")
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.kept = {name: value.to(self.model.device) for name, value in saved["kept"].items()}
            for name in ("steps", "read", "empty", "losses", "best"):
                setattr(self, name, saved[name])
            checkpoint.restore_random(saved["random"])

    def _sum(self) -> str:
        """A checksum of all responses and their labels, in order."""
        texts = [repr((*example.marked, example.labels)) for example in (*self.training, *self.held_out)]
        return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _cut(examples: Sequence[Example], size: int) -> list[list[Example]]:
    return [list(examples[start : start + size]) for start in range(0, len(examples), size)]


def _laid(batch: Sequence[Example], model: Any, packing: bool) -> Laid:
    return laid([example.marked for example in batch], model.device, packing)


def _logits(model: Any, inputs: Laid) -> Tensor:
    """float [steps, 2], at the ends of all steps of a batch."""
    return model(**inputs.inputs).logits.flatten(0, 1)[inputs.ends]


def _loss(logits: Tensor, batch: Sequence[Example], weights: Tensor) -> Tensor:
    """logits: of all steps of the batch."""
    labels = [label for example in batch for label in example.labels]
    known = [k for k, label in enumerate(labels) if label is not None]
    right = torch.tensor([labels[k] for k in known], device=logits.device)
    return cross_entropy(logits[known], right, weights)


def balance(examples: Sequence[Example]) -> Tensor:
    """float [2]: weights under which each class counts as much as the other."""
    known = [label for example in examples for label in example.labels if label is not None]
    counts = [len(known) - math.fsum(known), math.fsum(known)]
    if not all(counts):
        got = f"{counts[0]:g} wrong and {counts[1]:g} right steps"
        raise ValueError(f"records: got {got} to train on, expected both kinds")
    return torch.tensor([sum(counts) / (2 * count) for count in counts])


def cross_entropy(logits: Tensor, right: Tensor, weights: Tensor) -> Tensor:
    """0-d. logits: [n, 2], of wrong and of right; right: float [n], from 0 to 1; weights: [2], of the two."""
    counted = weights * torch.stack([1 - right, right], -1)
    return -(counted * logits.log_softmax(-1)).sum() / counted.sum()
