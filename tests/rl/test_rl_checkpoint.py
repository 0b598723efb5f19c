"""Checkpoints that were cut off, mangled or never finished, a full disk, and settings that somebody edited."""

import errno
import json
import os
import random
import signal
import threading

import pytest
import torch
from typer.testing import CliRunner

from prefixloss import cli
from prefixloss.io import checkpoint
from prefixloss.io.files import write_whole, write_whole_directory
from prefixloss.rl import UsageError, journal, train
from prefixloss.rl.config import Config
from prefixloss.rl.report import Report

TINY = {
    "updates": 2, "prompts": 2, "group": 2, "max_tokens": 8, "epochs": 1, "minibatches": 1, "eval_every": 2,
    "eval_problems": 2, "eval_samples": 2, "k": 2, "save_every": 1, "hidden_size": 8, "layers": 1, "warm_steps": 1,
    "warm_batch": 2,
}  # fmt: skip
STATE = {"model": {"w": torch.arange(40.0)}, "state": {"update": 3}, "history": [{"update": 3, "kl": 0.5}]}


def equal(one, other):
    return torch.equal(one["model"]["w"], other["model"]["w"]) and all(one[k] == other[k] for k in ("state", "history"))


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, STATE)
    return path


def test_any_flipped_byte_is_found(saved):
    whole = saved.read_bytes()
    assert equal(checkpoint.load(saved), STATE)
    for place in [*range(0, len(whole), len(whole) // 150), *range(len(whole) - 80, len(whole))]:
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        saved.write_bytes(damaged)
        in_the_mark = len(whole) - 72 <= place < len(whole) - 64
        if in_the_mark:  # without its checksum the file is as an earlier version's, and its parts' sums still hold
            assert equal(checkpoint.load(saved), STATE)
        else:
            with pytest.raises(UsageError, match=f"^--resume: {saved} is damaged, its checksum is another one"):
                checkpoint.load(saved)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda whole: b"", "it is empty"),
        (lambda whole: whole[: len(whole) // 2], "it is cut off or no checkpoint at all"),
        (lambda whole: whole[:100], "it is cut off or no checkpoint at all"),
        (lambda whole: random.Random(0).randbytes(5000), "it is cut off or no checkpoint at all"),
        (lambda whole: b"<html>not found</html>", "it is cut off or no checkpoint at all"),
        (lambda whole: whole[:2000] + whole[2001:], "its checksum is another one"),
        (lambda whole: whole + whole, "its checksum is another one"),
    ],
    ids=["empty", "half", "start", "garbage", "text", "byte-lost", "twice"],
)
def test_a_damaged_checkpoint_is_named_with_what_to_do_and_left_alone(saved, content, reason):
    damaged = content(saved.read_bytes())
    saved.write_bytes(damaged)
    (saved.parent / "config.json").write_text(json.dumps(Config(**TINY).__dict__))
    result = CliRunner().invoke(cli.app, ["train", "--resume", str(saved.parent)])
    assert result.exit_code == 2
    said = result.stderr.replace("\n", "")
    assert f"prefixloss: --resume: {saved} is damaged, {reason}: put a copy of it in its place, or delete it" in said
    assert saved.read_bytes() == damaged


def test_a_checkpoint_of_an_earlier_version_is_loaded_if_its_parts_sums_hold(saved):
    torch.save({**STATE, "random": checkpoint.random_state()}, saved)
    assert equal(checkpoint.load(saved), STATE)
    damaged = bytearray(saved.read_bytes())
    damaged[damaged.index(STATE["model"]["w"].numpy().tobytes()) + 20] ^= 1
    saved.write_bytes(damaged)
    assert not equal(torch.load(saved), STATE)  # torch itself does not look
    with pytest.raises(UsageError, match=r"the checksum of its part 'checkpoint/data/0' is another one"):
        checkpoint.load(saved)


def test_torch_reads_a_checkpoint_as_it_is(saved):
    assert equal(torch.load(saved, weights_only=True), STATE)


def test_a_file_that_holds_no_state_or_code_is_not_loaded(saved):
    for content in ([1, 2], {"run": os.system}):
        torch.save(content, saved)
        with pytest.raises(UsageError, match="cannot be loaded"):
            checkpoint.load(saved)


# a full disk


def test_a_full_disk_keeps_the_old_checkpoint_and_leaves_nothing_behind(saved):
    before = saved.read_bytes()
    (saved.parent / ".checkpoint.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as failed:
        checkpoint.save(saved, STATE)
    assert (failed.value.errno, failed.value.filename) == (errno.ENOSPC, str(saved))
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["checkpoint.pt"]


def test_a_run_on_a_full_disk_says_so_and_goes_on_when_there_is_room(tmp_path, monkeypatch):
    run, real, saves = tmp_path / "run", checkpoint.save, []

    def save(path, state):
        saves.append(path)
        if len(saves) == 3:  # the start, the first update, and now there is no room
            (run / ".checkpoint.pt.tmp").symlink_to("/dev/full")
        real(path, state)

    monkeypatch.setattr(checkpoint, "save", save)
    options = [word for key, value in TINY.items() if key != "warm_batch" for word in (option(key), str(value))]
    result = CliRunner().invoke(cli.app, ["train", "--out", str(run), *options])
    said = result.stderr.replace("\n", "")
    assert result.exit_code == 1, result.output
    assert f"prefixloss: {run / 'checkpoint.pt'}: No space left on device; the checkpoint from before is kept" in said
    assert f"prefixloss train --resume {run}" in said
    assert checkpoint.load(run / "checkpoint.pt")["state"]["update"] == 1
    assert CliRunner().invoke(cli.app, ["train", "--resume", str(run)]).exit_code == 0
    assert checkpoint.load(run / "checkpoint.pt")["state"]["update"] == 2


def option(key):
    return "--" + key.replace("_", "-")


def test_what_cannot_be_written_leaves_no_temporary_files(tmp_path):
    def fail(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for write in (write_whole, write_whole_directory):
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path / "x", fail)
    assert list(tmp_path.iterdir()) == []


# signals


def test_a_scheduler_s_signal_saves_and_says_how_to_go_on(tmp_path, monkeypatch):
    run, real = tmp_path / "run", train.update

    def update(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # schedulers send it to every process, and torchrun once more
        return real(*arguments, **options)

    monkeypatch.setattr(train, "update", update)
    journal.open_run(run, Config(**{**TINY, "save_every": 100}).__dict__)
    before = signal.getsignal(signal.SIGTERM)
    result = CliRunner().invoke(cli.app, ["train", "--resume", str(run)])
    assert result.exit_code == 128 + signal.SIGTERM
    assert f"stopped; to go on: prefixloss train --resume {run}" in result.stderr.replace("\n", "")
    assert checkpoint.load(run / "checkpoint.pt")["state"]["update"] == 1
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert signal.getsignal(signal.SIGTERM) is before


def test_one_that_comes_before_the_first_update_ends_before_it(tmp_path, monkeypatch):
    monkeypatch.setattr("prefixloss.rl.run.warm_start", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(train, "update", None)
    with pytest.raises(checkpoint.Stopped) as stopped:
        train.train(Config(**TINY), tmp_path, Report())
    assert stopped.value.number == signal.SIGTERM
    assert checkpoint.load(tmp_path / "checkpoint.pt")["state"]["update"] == 0


def test_under_torchrun_which_repeats_signals_a_second_ctrl_c_waits_too(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    stop = checkpoint.Stop()
    with stop.listening():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked


def test_signals_are_left_alone_in_another_thread():
    seen = []

    def listen():
        with checkpoint.Stop().listening():
            seen.append(True)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [True]


# edited settings


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"updatse": 3}, "an unknown key: 'updatse'"),
        ({"updates": "many"}, "a value of the wrong type: updates: got 'many', expected a whole number"),
        ({"updates": 3.5}, "a value of the wrong type: updates: got 3.5, expected a whole number"),
        ({"updates": True}, "a value of the wrong type: updates: got True, expected a whole number"),
        ({"chat": 1}, "a value of the wrong type: chat: got 1, expected true or false or null"),
        ({"rollouts": True}, "a value of the wrong type: rollouts: got True, expected a text or null"),
        ({"lr": None}, "a value of the wrong type: lr: got None, expected a number"),
        ({"lr": 10**400}, "a value of the wrong type: lr: got a whole number of 1329 bits, expected a number"),
        ({"model": 3}, "a value of the wrong type: model: got 3, expected a text or null"),
        (
            {"shorten": [1]},
            "a value of the wrong type: shorten: got [1], expected a text or a whole number",
        ),
        ({"updates": 0}, "a value that cannot work: updates: got 0, expected a whole number of at least 1"),
        ({"prompts": 10**400}, "a value that cannot work: prompts: got a whole number of 1329 bits, expected at most"),
        ({"seed": 2**63}, "a value that cannot work: seed: got"),
        ({"lr": float("nan")}, "a value that cannot work: lr: got nan"),
        ({"timeout": 1e300}, "a value that cannot work: timeout: got 1e+300"),
        ({"k": 9}, "a value that cannot work: k: got 9, expected at most --eval-samples, 8"),
        ({"detector": "oracle"}, "a value that cannot work: detector: got 'oracle', expected auto"),
        ({"data": ""}, "a value that cannot work: data: got ''"),
    ],
)
def test_an_edited_setting_is_named_with_its_file(tmp_path, values, says):
    (tmp_path / "config.json").write_text(json.dumps(values))
    result = CliRunner().invoke(cli.app, ["train", "--resume", str(tmp_path)])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"prefixloss: --resume: config.json has {says}")
    assert str(tmp_path / "config.json") in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_setting_that_an_earlier_version_did_not_have_is_its_default():
    assert Config.of({"seed": 3, "lr": 1}) == Config(seed=3, lr=1.0)


def test_settings_that_do_not_fit_the_checkpoint_are_refused(tmp_path):
    train.train(Config(**{**TINY, "updates": 1}), tmp_path, Report())
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "hidden_size": 16}))
    with pytest.raises(UsageError, match=r"checkpoint\.pt does not fit the settings in config\.json"):
        train.train(Config.read(tmp_path), tmp_path, Report())


def test_a_count_of_rollouts_from_an_earlier_version_is_the_continuations():
    assert Config.of({"rollouts": 3, "updates": 7}) == Config(continuations=3, updates=7)
    with pytest.raises(UsageError, match=r"config.json has a value that cannot work: continuations: got 0"):
        Config.of({"rollouts": 0})
