"""The training of a judge that is killed, stopped, out of room or begun twice: it goes on to the same bits, or says why
not."""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import process_context
from safetensors.torch import load_file
from test_detect_train_prm import base_in, invoke, records

from prefixloss import cli
from prefixloss.detect import prm_learner, train_prm
from prefixloss.detect.models.prm import PRM
from prefixloss.detect.prm_examples import Settings, examples_of, load_base
from prefixloss.io import checkpoint
from prefixloss.io.lock import Lock

# three epochs of five steps, of which the last has other ones' company
SETTINGS = Settings(epochs=3, batch_size=8, lr=1e-2, held_out=0.2, save_every=2, device="cpu")
RECORDS = records(44)


class Cut(Exception):
    """Whatever ends a process."""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """With dropout: each step asks the random generator."""
    return base_in(tmp_path_factory.mktemp("base"), attention_dropout=0.2)


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory) -> Path:
    """What comes of a run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "prm"
    counts: list[tuple[int, int]] = []
    train_prm.train_prm(RECORDS, base, out, SETTINGS, begun=lambda *steps: counts.append(steps))
    assert counts == [(15, 0)]
    assert [path.name for path in out.parent.iterdir()] == ["prm"]
    return out


def same(one: Path, other: Path) -> bool:
    """Every bit of the weights, and the reports."""
    left, right = (load_file(path / "model.safetensors") for path in (one, other))
    alike = left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    return alike and (one / "report.json").read_text() == (other / "report.json").read_text()


def cut_at(step: int, number: int | None = None):
    """What ends a run behind that step: an exception, or a signal."""
    done = []

    def advance(loss: float) -> None:
        done.append(loss)
        if len(done) == step:
            if number is None:
                raise Cut
            os.kill(os.getpid(), number)

    return advance


def resumed(base: str, out: Path, settings: Settings = SETTINGS) -> tuple[int, int]:
    counts: list[tuple[int, int]] = []
    train_prm.train_prm(RECORDS, base, out, settings, begun=lambda *steps: counts.append(steps), resume=True)
    return counts[0]


# the same bits


@pytest.mark.parametrize(("step", "done"), [(1, 0), (2, 0), (3, 2), (11, 10), (15, 14)])
def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(base, whole, tmp_path, step, done) -> None:
    """Before the first checkpoint, at one, behind one, at the end of an epoch, and behind the last step."""
    out = tmp_path / "prm"
    with pytest.raises(Cut):
        train_prm.train_prm(RECORDS, base, out, SETTINGS, advance=cut_at(step))
    assert not out.exists()
    assert (tmp_path / "prm.part").exists() == (done > 0)
    (tmp_path / "prm.part").mkdir(exist_ok=True)
    (tmp_path / "prm.part" / ".checkpoint.pt.tmp").write_bytes(b"half") if done else None
    torch.manual_seed(99)  # another process's generator is elsewhere
    assert resumed(base, out) == (15, done)
    assert same(out, whole)
    assert [path.name for path in tmp_path.iterdir()] == ["prm"]


def test_it_may_be_cut_off_again_and_again(base, whole, tmp_path) -> None:
    out = tmp_path / "prm"
    for _ in range(7):
        with pytest.raises(Cut):
            train_prm.train_prm(RECORDS, base, out, SETTINGS, advance=cut_at(3), resume=True)
    assert resumed(base, out) == (15, 14)
    assert same(out, whole)


def test_packed_rows_go_on_to_the_same_bits(base, tmp_path) -> None:
    settings = replace(SETTINGS, packing=True)
    train_prm.train_prm(RECORDS, base, tmp_path / "whole", settings)
    with pytest.raises(Cut):
        train_prm.train_prm(RECORDS, base, tmp_path / "prm", settings, advance=cut_at(7))
    resumed(base, tmp_path / "prm", settings)
    assert same(tmp_path / "prm", tmp_path / "whole")


def test_the_best_epochs_weights_are_put_back_beside_those_of_the_last_step(base, tmp_path) -> None:
    def begun() -> prm_learner.Learner:
        model, tokenizer = load_base(base, SETTINGS)
        return prm_learner.Learner(model, *examples_of(RECORDS, model, tokenizer, SETTINGS), SETTINGS)

    first, path = begun(), tmp_path / "checkpoint.pt"
    for batch in first.batches():
        first.step(batch)
    first.end_epoch()
    assert not first.model.training
    first.step(first.batches()[0])
    assert first.model.training  # with dropout again
    checkpoint.save(path, first.state())
    second = begun()
    second.restore(checkpoint.load(path), path)
    for name, value in second.model.state_dict().items():
        assert torch.equal(second.kept[name], first.kept[name])
        assert torch.equal(value, first.model.state_dict()[name])
    assert not torch.equal(second.kept["score.weight"], second.model.score.weight)


def test_a_checkpoint_comes_every_so_many_steps(base, tmp_path, monkeypatch) -> None:
    saved, real = [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda path, state: (saved.append(state["steps"]), real(path, state)))
    train_prm.train_prm(RECORDS, base, tmp_path / "prm", replace(SETTINGS, save_every=4))
    assert saved == [4, 8, 12]


# the command


def labelled(folder: Path) -> Path:
    path = folder / "labels.jsonl"
    rows = [{"problem": r.problem, "steps": r.steps, "first_error": None if r.label < 0 else r.label} for r in RECORDS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(data: Path, base: str, out: Path) -> list[str]:
    given = {"epochs": 3, "batch-size": 8, "lr": 0.01, "held-out": 0.2, "save-every": 2, "device": "cpu"}
    options = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return ["train", str(data), "--model", base, "--out", str(out), *options]


def said(result) -> str:
    return " ".join(result.stderr.split())


def in_steps(monkeypatch, act) -> None:
    """act: told the number of each step of this process, behind it."""
    real, done = prm_learner.Learner.step, []

    def step(self, batch):
        loss = real(self, batch)
        done.append(loss)
        act(len(done))
        return loss

    monkeypatch.setattr(prm_learner.Learner, "step", step)


def held(arguments: list[str], stop: int, line) -> None:
    """The command in a process of its own, that says when it has made a step, and waits there."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

    def wait(step: int) -> None:
        if step == stop:
            line.send("here")
            line.recv()

    with pytest.MonkeyPatch.context() as patch:
        in_steps(patch, wait)
        sys.argv = ["prefixloss", "prm", *arguments]
        cli.main()


def test_a_killed_command_is_resumed_by_the_name_of_its_directory(base, whole, tmp_path) -> None:
    """And while it is alive nobody else gets in."""
    out, data = tmp_path / "prm", labelled(tmp_path)
    line, end = process_context().Pipe()
    process = process_context().Process(target=held, args=(command(data, base, out), 8, end), daemon=True)
    process.start()
    end.close()
    assert line.recv() == "here"
    for arguments in (command(data, base, out), ["train", "--resume", str(out)]):
        result = invoke(*arguments)
        assert result.exit_code == 2, result.output
        assert f"{out}.part is in use by process {process.pid} on" in said(result)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    result = invoke(*command(data, base, out))
    assert result.exit_code == 2, result.output
    left = f"--out: {out}.part is left from a run that did not end; --resume {out} goes on with it, or delete it"
    assert left in said(result)
    assert checkpoint.load(tmp_path / "prm.part" / "checkpoint.pt")["steps"] == 6
    result = invoke("train", "--resume", out)
    assert result.exit_code == 0, result.output
    assert same(out, whole)
    assert PRM(str(out)).detect("1?", ["ok a", "no b"]).step == 1
    assert not (tmp_path / "prm.part").exists()
    result = invoke("train", "--resume", out)
    assert (result.exit_code, "has ended" in said(result)) == (2, True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [3, 15])
def test_a_signal_saves_what_was_done_and_says_how_to_go_on(base, whole, tmp_path, monkeypatch, number, step) -> None:
    """Behind the third step, which no checkpoint is due at, and behind the last."""
    out, data = tmp_path / "prm", labelled(tmp_path)
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        in_steps(patch, lambda done: os.kill(os.getpid(), number) if done == step else None)
        result = invoke(*command(data, base, out))
    assert result.exit_code == 128 + number, result.output
    assert f"stopped; to go on: prefixloss prm train --resume {out}" in said(result)
    assert signal.getsignal(number) is before
    assert checkpoint.load(tmp_path / "prm.part" / "checkpoint.pt")["steps"] == step
    assert not out.exists()
    result = invoke("train", "--resume", out)
    assert result.exit_code == 0, result.output
    assert same(out, whole)


def test_a_signal_before_the_first_step_leaves_nothing(base, tmp_path, monkeypatch) -> None:
    real = train_prm.load_base

    def loaded(name, settings):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(name, settings)

    monkeypatch.setattr(train_prm, "load_base", loaded)
    result = invoke(*command(labelled(tmp_path), base, tmp_path / "prm"))
    assert result.exit_code == 128 + signal.SIGTERM
    assert said(result).endswith("stopped")
    assert [path.name for path in tmp_path.iterdir()] == ["labels.jsonl"]


def test_a_full_disk_keeps_the_checkpoint_from_before(base, whole, tmp_path, monkeypatch) -> None:
    out, data = tmp_path / "prm", labelled(tmp_path)
    full = tmp_path / "prm.part" / ".checkpoint.pt.tmp"
    with monkeypatch.context() as patch:
        in_steps(patch, lambda done: full.symlink_to("/dev/full") if done == 6 else None)
        result = invoke(*command(data, base, out))
    assert result.exit_code == 1, result.output
    kept = (
        f"prefixloss: {out}.part/checkpoint.pt: No space left on device; to go on: prefixloss prm train --resume {out}"
    )
    assert kept in said(result)
    assert checkpoint.load(tmp_path / "prm.part" / "checkpoint.pt")["steps"] == 4
    assert invoke("train", "--resume", out).exit_code == 0
    assert same(out, whole)


# what is refused


@pytest.fixture
def stopped(base, tmp_path) -> Path:
    """The --out of a run that stopped after four steps."""
    out = tmp_path / "prm"
    source = {"files": [str(labelled(tmp_path))], "form": "labelled"}
    with pytest.raises(checkpoint.Stopped):
        train_prm.train_prm(RECORDS, base, out, SETTINGS, advance=cut_at(4, signal.SIGINT), source=source)
    return out


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[: len(data) // 2], "it is cut off or no checkpoint at all"),
        (lambda data: b"", "it is empty"),
        (lambda data: data[:3000] + bytes([data[3000] ^ 1]) + data[3001:], "its checksum is another one"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_left_alone(stopped, damage, reason) -> None:
    path = stopped.with_name("prm.part") / "checkpoint.pt"
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    result = invoke("train", "--resume", stopped)
    assert result.exit_code == 2, result.output
    assert f"prefixloss: --resume: {path} is damaged, {reason}: put a copy of it in its place, or delete it" in said(
        result
    )
    assert path.read_bytes() == damaged


def test_other_labels_than_it_began_with_are_refused(stopped, tmp_path) -> None:
    data = tmp_path / "labels.jsonl"
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    lines[1]["first_error"] = None if lines[1]["first_error"] == 0 else 0
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = invoke("train", "--resume", stopped)
    assert result.exit_code == 2, result.output
    assert "checkpoint.pt does not fit" in said(result)
    assert "the labelled responses, or the tokenizer that read them, are other ones" in said(result)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"settings": {"batch_size": 4}}, "checkpoint.pt does not fit the settings in config.json, put those back"),
        ({"settings": {"batch_size": 2.5}}, "batch_size: got 2.5, expected a whole number of at least 1"),
        ({"settings": {"packing": "yes"}}, "packing: got 'yes', expected True or False"),
        ({"settings": {"device": 3}}, "device: got 3, expected a text"),
        ({"settings": {"colour": 3}}, "config.json has settings that cannot work"),
        ({"settings": {"held_out": "a"}}, "config.json has settings that cannot work"),
        ({"settings": 3}, "config.json has settings that cannot work"),
        ({"files": "a"}, "config.json has settings that cannot work: expected texts"),
        ({"base": None}, "config.json has settings that cannot work: expected texts"),
        ({"form": "plain"}, "--format: got 'plain'"),
        ({"files": ["/nowhere/labels.jsonl"]}, "/nowhere/labels.jsonl"),
        (None, "is not a run that stopped, there is no readable"),
        ([1], "config.json holds no settings"),
    ],
)
def test_edited_settings_are_named(stopped, change, says) -> None:
    path = stopped.with_name("prm.part") / "config.json"
    values = json.loads(path.read_text())
    if isinstance(change, dict):
        inner = change.get("settings")
        values |= {"settings": {**values["settings"], **inner}} if isinstance(inner, dict) else change
    path.write_text("{" if change is None else json.dumps(values if isinstance(change, dict) else change))
    result = invoke("train", "--resume", stopped)
    assert result.exit_code == 2, result.output
    assert says in said(result)
    assert "Traceback" not in result.output
    assert (path.parent / "checkpoint.pt").exists()


def test_a_run_goes_on_only_where_it_was_asked_to_and_with_its_own_settings(base, stopped) -> None:
    with pytest.raises(checkpoint.UsageError, match=r"--out: .*prm\.part is left from a run that did not end"):
        train_prm.train_prm(RECORDS, base, stopped, SETTINGS)
    with pytest.raises(checkpoint.UsageError, match=r"--out: .*prm\.part holds a run with other settings"):
        resumed(base, stopped, replace(SETTINGS, seed=1))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--epochs", "3"], "--epochs: cannot be given with --resume"),
        (["--model", "m"], "--model: cannot be given with --resume"),
        (["labels.jsonl"], "FILES: cannot be given with --resume"),
    ],
)
def test_a_resumed_run_keeps_its_settings(stopped, arguments, says) -> None:
    result = invoke("train", *arguments, "--resume", stopped)
    assert (result.exit_code, says in said(result)) == (2, True), result.output


def test_a_directory_without_a_run_is_not_resumed(tmp_path) -> None:
    result = invoke("train", "--resume", tmp_path / "nothing")
    assert (result.exit_code, "nothing is not a run that stopped" in said(result)) == (2, True), result.output
    result = invoke("train", "--model", "m")
    assert (result.exit_code, "expected FILES, --model and --out, or --resume" in said(result)) == (2, True)


def test_a_directory_that_is_locked_is_left_alone(base, tmp_path) -> None:
    with Lock() as mine:
        mine.take(tmp_path / "prm.part")
        with pytest.raises(checkpoint.UsageError, match=f"in use by process {os.getpid()} on"):
            resumed(base, tmp_path / "prm")
        assert (tmp_path / "prm.part").exists()


def test_a_loss_that_is_not_finite_ends_the_run(base, tmp_path, monkeypatch) -> None:
    real = prm_learner.cross_entropy
    monkeypatch.setattr(prm_learner, "cross_entropy", lambda *given: real(*given) * float("nan"))
    with pytest.raises(ValueError, match=r"lr: got 0\.01, and the loss is nan in step 1: lower it"):
        train_prm.train_prm(RECORDS, base, tmp_path / "prm", SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_only_whole_counts_are_settings() -> None:
    for name in ("epochs", "batch_size", "max_tokens", "save_every"):
        for value in (0, 1.5, True, "2"):
            with pytest.raises(ValueError, match=f"{name}: got {value!r}, expected a whole number of at least 1"):
                Settings(**{name: value})
