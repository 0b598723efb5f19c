"""A judge trained on rollout labels of the built-in task, and judges beside the exact check.

A model goes on from the prefixes of a weaker one's responses; where its chance of a right answer falls is the label of
`prefixloss prm label`, and `prefixloss prm train` makes a process reward model of the same model's body. Nobody tells
either which step is wrong: the exact check only measures them, on other problems.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from prefixloss.detect.base import Detector
from prefixloss.detect.choose import by_name
from prefixloss.detect.evaluate import KINDS, evaluate
from prefixloss.detect.prm_commands import label
from prefixloss.detect.prm_examples import Settings
from prefixloss.detect.records import Record, read_records
from prefixloss.detect.train_prm import train_prm
from prefixloss.io.files import json_line, write_whole
from prefixloss.rl import task, train
from prefixloss.rl.config import Config
from prefixloss.rl.policy import Policy
from prefixloss.steps import split

RESPONSES = 4096  # that are labelled
MEASURED = 512  # other ones, to held-out problems
SAMPLES = 8
SETTINGS = Settings(epochs=4, batch_size=32, lr=1e-3, device="cpu")
ROLLOUTS = "rollouts:{model}?samples={samples}&max_tokens=64&budget=1000&batch_size=256"
AT_ONCE = 512  # responses a batch that are judged
SAMPLED = 32  # problems a batch that are answered
Writer = Callable[[], Policy]


def trained(directory: Path, model: Path, writer: Writer, config: Config) -> Path:
    """The directory of the judge, made once. model: whose continuations label, and whose body is trained; writer:
    makes the policy whose responses are labelled."""
    path = directory / "judge"
    if not path.exists():
        responses, labels = directory / "judge-responses.jsonl", directory / "judge-labels.jsonl"
        lines = [
            json_line({"problem": problem.question, "response": text, "answer": problem.answer})
            for problem, text in written(writer(), config, RESPONSES, held_out=False)
        ]
        write_whole(responses, lambda file: file.write(b"".join(lines)))
        label(responses, ROLLOUTS.format(model=model, samples=SAMPLES), labels, "plain", "lines", 0.0, AT_ONCE)
        train_prm(read_records(labels, "labelled"), str(model), path, SETTINGS, resume=True)
    return path


def written(policy: Policy, config: Config, count: int, *, held_out: bool) -> list[tuple[task.Problem, str]]:
    """Responses that came to an end, `config.group` to a problem."""
    torch.manual_seed(config.seed)
    problems = task.chains(config.seed, 0, count // config.group, held_out=held_out)
    made: list[tuple[task.Problem, str]] = []
    for start in range(0, len(problems), SAMPLED):
        repeated, sampled = train.sample(config, policy, problems[start : start + SAMPLED])
        ended = zip(repeated, sampled.texts, sampled.finished.tolist(), strict=True)
        made += [(problem, text) for problem, text, finished in ended if finished]
    return made


def records_of(responses: list[tuple[task.Problem, str]]) -> list[Record]:
    """With the exact check's labels."""
    records = []
    for problem, text in responses:
        wrong = -1 if task.check_answer(problem, text) else task.check_steps(problem, text).wrong
        steps = [span.of(text) for span in split(text, "lines")]
        records.append(Record(problem.question, steps, problem.answer, min(wrong, len(steps) - 1), {}))
    return records


def measure(directory: Path, model: Path, writer: Writer, config: Config) -> dict[str, Any]:
    """What each judge finds, against the exact check."""
    path = trained(directory, model, writer, config)
    policy = writer()
    own = directory / "judge-writer"
    if not own.exists():
        policy.save(own)
    records = records_of(written(policy, replace(config, seed=config.seed + 1), MEASURED, held_out=True))
    asked: dict[str, Detector] = {
        **{f"the writer's rollouts, {n} samples": by_name(ROLLOUTS.format(model=own, samples=n)) for n in (8, 32)},
        **{f"the model's rollouts, {n} samples": by_name(ROLLOUTS.format(model=model, samples=n)) for n in (2, 4, 8)},
        "the trained judge": by_name(f"prm:{path}"),
    }
    run = partial(evaluate, records=records, answers=True, batch_size=AT_ONCE)
    scores = {name: run(detector).as_json() for name, detector in asked.items()}
    wrong = sum(record.label != -1 for record in records)
    return {"responses": len(records), "wrong": wrong, "labelled": RESPONSES, "samples": SAMPLES, "judges": scores}


def table(record: dict[str, Any]) -> str:
    wrong, right = record["wrong"], record["responses"] - record["wrong"]
    lines = [
        "## Judges beside the exact check",
        "",
        f"{record['responses']} responses to held-out problems, {wrong} of them wrong. The judge was trained on the",
        f"labels of {record['labelled']:,} other ones, by {record['samples']} of the model's rollouts a prefix.",
        "",
        "| | exact | earlier | later | none found | false alarms | continuations a response | calibration error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, scores in record["judges"].items():
        shares = scores["shares"]
        cells = [f"{100 * shares[kind] * record['responses'] / wrong:.1f} %" for kind in KINDS[1:4]]
        exact = scores["exact_among_wrong"] or 0.0
        alarms = shares["false alarm"] * record["responses"] / max(right, 1)
        calls = scores["calls"] / record["responses"] if "rollouts" in name else 0
        error = scores["calibration_error"]
        cells = [f"{100 * exact:.1f} %", *cells, f"{100 * alarms:.1f} %", f"{calls:.0f}", f"{error or 0:.2f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
