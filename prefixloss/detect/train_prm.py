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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from prefixloss.detect.evaluate import Scores
from prefixloss.detect.models.packing import check_packing
from prefixloss.detect.prm_examples import Settings, examples_of, load_base
from prefixloss.detect.prm_learner import Learner
from prefixloss.detect.prm_run import Run, opened
from prefixloss.detect.records import Record
from prefixloss.io import checkpoint
from prefixloss.io.files import write_whole_directory


class Trained(NamedTuple):
    """What came of it, on the problems that were held out. left_out: responses longer than the model takes. padding:
    of what the model read in training, the share without a token. loss: for each epoch. best: the epoch that was kept,
    from 0. threshold: the best one of `by_threshold`."""

    training: int
    left_out: int
    padding: float
    loss: list[float]
    best: int
    threshold: float
    by_threshold: dict[float, Scores]


def train_prm(
    records: Sequence[Record],
    base: str,
    out: Path,
    settings: Settings = Settings(),
    begun: Callable[[int, int], None] = lambda steps, done: None,
    advance: Callable[[float], None] = lambda loss: None,
    *,
    resume: bool = False,
    source: Mapping[str, Any] | None = None,
) -> Trained:
    """Trains a token classifier with the body of `base`, a causal LM or any other, and saves it in `out`, a new
    directory, with report.json beside it. Until then there is `out`.part, with a checkpoint to go on from.

    records: labelled (see `records`). begun: told how many steps there are, and how many of them are done; advance: the
    loss after each. resume: go on with a run that did not end, if there is one. source: where the records are from,
    kept with the settings.

    ValueError: a record without a label, one kind of step only, too few problems, no response that fits, or a loss that
    is not finite. UsageError: see `opened`, and a checkpoint that is damaged or of another run. KeyboardInterrupt:
    stopped, and saved if there was a step to save. OSError: a file cannot be written; the last checkpoint is kept.
    """
    if any(record.label is None for record in records):
        raise ValueError("records: got one without a label, expected labels of the first wrong step")
    with opened(out, {**(source or {}), "base": base, "settings": asdict(settings)}, resume) as run:
        torch.manual_seed(settings.seed)
        model, tokenizer = load_base(base, settings)
        training, held_out = made = examples_of(records, model, tokenizer, settings)
        if settings.packing:
            check_packing(model, [example.marked for example in training])
        learner = Learner(model, training, held_out, settings)
        if run.saved is not None:
            learner.restore(run.saved, run.path)
        begun(learner.total, learner.steps)
        _learn(learner, run, advance)
        by_threshold = learner.scores()
        threshold = best_threshold(by_threshold)
        model.config.prefixloss_threshold = threshold
        left_out = len(records) - sum(map(len, made))
        trained = Trained(
            len(training), left_out, learner.padding, learner.losses, learner.best, threshold, by_threshold
        )
        write_whole_directory(out, lambda folder: _save(folder, model, tokenizer, trained))
        run.end()
        return trained


def best_threshold(by_threshold: Mapping[float, Scores]) -> float:
    """The one with the best F1, or with the most exact verdicts where all responses are of one kind and there is no
    F1; of equally good ones that nearest to 1/2."""

    def worth(threshold: float) -> tuple[float, float]:
        scores = by_threshold[threshold]
        return scores.share("exact") if scores.f1 is None else scores.f1, -abs(threshold - 0.5)

    return max(by_threshold, key=worth)


def _learn(learner: Learner, run: Run, advance: Callable[[float], None]) -> None:
    """All steps that are left. Stopped, after the step at hand is saved, if the run was asked to end."""
    if run.stop.asked:
        raise checkpoint.Stopped(run.stop.number)
    while learner.epoch < learner.settings.epochs:
        for batch in learner.batches():
            advance(learner.step(batch))
            if run.stop.asked or learner.steps % learner.settings.save_every == 0:
                run.save(learner.state())
            if run.stop.asked:
                raise checkpoint.Stopped(run.stop.number)
        learner.end_epoch()
    learner.model.load_state_dict(learner.kept)


def _save(folder: Path, model: Any, tokenizer: Any, trained: Trained) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    chosen = trained.by_threshold[trained.threshold]
    report = {
        "training_responses": trained.training,
        "held_out_responses": len(chosen.labels),
        "left_out": trained.left_out,
        "padding": trained.padding,
        "held_out_loss": trained.loss,
        "epoch": trained.best + 1,
        "threshold": trained.threshold,
        "f1_by_threshold": {f"{t:g}": scores.f1 for t, scores in trained.by_threshold.items()},
        "calibration_error": chosen.calibration_error(),
        "reliability": [b._asdict() for b in chosen.reliability()],
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
