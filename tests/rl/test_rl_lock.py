"""One run at a time in a directory: the second is told who is first, and a dead one keeps nobody out."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prefixloss import cli
from prefixloss.io import lock
from prefixloss.io.lock import Lock
from prefixloss.rl import UsageError, journal
from prefixloss.rl.config import Config
from prefixloss.rl.run import open_run
from prefixloss.rl.team import Team

HOLDER = """
import sys
from pathlib import Path
from prefixloss.io.lock import Lock
lock = Lock()
lock.take(Path(sys.argv[1]))
print("taken", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def held(tmp_path):
    """A run's directory that another process has locked, and the process."""
    run = tmp_path / "run"
    run.mkdir()
    journal.open_run(run, Config().__dict__)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert process.stdout.readline() == "taken\n"
    yield run, process
    process.kill()
    process.communicate()


def test_the_second_run_is_told_who_is_first_and_takes_over_once_it_is_dead(held):
    run, process = held
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    for arguments in (["--resume", run], ["--out", run, "--overwrite"]):
        result = CliRunner().invoke(cli.app, ["train", *map(str, arguments)])
        assert result.exit_code == 2, result.output
        assert f"{run} is in use by process {process.pid} on {os.uname().nodename}" in result.stderr.replace("\n", "")
        assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    process.kill()
    process.wait()
    with Lock() as mine:
        mine.take(run)
        assert f"process {os.getpid()} on" in (run / lock.NAME).read_text()
    assert not (run / lock.NAME).exists()


def test_a_lock_is_free_again_after_its_run_and_a_directory_with_nothing_else_is_empty(tmp_path):
    with Lock() as first:
        first.take(tmp_path / "new" / "run")
        assert lock.is_empty(tmp_path / "new" / "run")
        with Lock() as second, pytest.raises(UsageError, match=f"in use by process {os.getpid()} on"):
            second.take(tmp_path / "new" / "run")
    with Lock() as third:
        third.take(tmp_path / "new" / "run")


def test_a_lock_whose_file_its_owner_has_just_removed_is_taken_again(tmp_path, monkeypatch):
    locked, removed = lock._locked, []

    def remove_first(file, run):
        if not removed:
            removed.append((run / lock.NAME).unlink())
        return locked(file, run)

    monkeypatch.setattr(lock, "_locked", remove_first)
    with Lock() as first:
        first.take(tmp_path)
        with Lock() as second, pytest.raises(UsageError, match="in use"):
            second.take(tmp_path)


def test_clearing_a_run_keeps_the_lock(tmp_path):
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "weights").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "policy")
    (tmp_path / "config.json").write_text("")
    with Lock() as held:
        held.take(tmp_path)
        lock.clear(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [lock.NAME]


def test_a_file_system_without_locks_is_named_and_trained_on(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    with Lock() as held, pytest.warns(RuntimeWarning, match="cannot be locked .No locks available"):
        held.take(tmp_path)


def test_another_run_s_directory_is_not_resumed_under_other_settings(tmp_path):
    journal.open_run(tmp_path, Config(seed=1).__dict__)
    with Lock() as held, pytest.raises(UsageError, match="holds a run with other settings"):
        open_run(Config(seed=2), tmp_path, False, Team(), held)
    with Lock() as held:
        assert open_run(Config(seed=1), tmp_path, False, Team(), held) is None
