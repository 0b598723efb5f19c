"""Every example runs as it stands, on a tiny model; `loop.py` has tests of its own."""

from __future__ import annotations

import json
import os
import runpy
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prefixloss.integrations import verl
from prefixloss.integrations.token_loss import first_error_of, signed_score
from prefixloss.rl.policy import tiny_policy

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_every_example_is_here() -> None:
    known = {"distill.py", "find_errors.py", "fsdp2.py", "loop.py", "objective.py", "tour.ipynb"}
    known |= {"transformers_lora.py", "trl_vppo.py", "verl.py"}
    assert {path.name for path in EXAMPLES.iterdir() if path.name != "__pycache__"} == known


def test_distill(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("distill.py", monkeypatch, "--steps", "12")
    divergence = [float(line.rpartition(" ")[2]) for line in capsys.readouterr().out.splitlines()]
    assert divergence[-1] < 0.6 * divergence[0]


def test_find_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["Step 1: 2 + 2 = 4\nStep 2: 4 * 3 = 13", "Step 1: 2 + 2 = 4\nStep 2: 4 * 3 = 12"]
    file = tmp_path / "responses.jsonl"
    file.write_text("".join(json.dumps({"problem": "(2 + 2) * 3", "response": x}) + "\n" for x in texts))
    run("find_errors.py", monkeypatch, str(file), "--out", str(tmp_path / "found"))
    assert capsys.readouterr().out.endswith("no error found: 1\nstep 2: 1\n")
    assert (tmp_path / "found.html").read_text().count('class="why"') == 2


def test_objective(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("objective.py", monkeypatch, "--steps", "20")
    rewards = [float(line.rpartition(" ")[2]) for line in capsys.readouterr().out.splitlines()]
    assert rewards[-1] > rewards[0] + 0.2


def test_transformers_lora(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    run("transformers_lora.py", monkeypatch, "--steps", "2")
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert first.endswith("ratio at most 1.000")
    assert not second.endswith("ratio at most 1.000")  # the weights moved


def test_trl_vppo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl")
    run("trl_vppo.py", monkeypatch, "--steps", "1")
    assert "grad_norm" in capsys.readouterr().out


@pytest.fixture
def gsm8k(tmp_path: Path) -> Path:
    """A folder of data like GSM8K's, in a path that a shell and Hydra would both misread."""
    folder = tmp_path / "Bob's (data) = $1"
    folder.mkdir()
    lines = [{"question": f"What is {n} + 2?", "answer": f"{n} + 2 = {n + 2}.\n#### {n + 2}"} for n in range(16)]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_verl_writes_the_data_and_says_what_is_missing(
    gsm8k: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read = pytest.importorskip("pyarrow.parquet").read_table
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)  # so that no machine starts a training run
    with pytest.raises(SystemExit) as end:
        run("verl.py", monkeypatch, "--data", str(gsm8k), "--model", "tiny")
    assert end.value.code == 1
    out, err = capsys.readouterr()
    assert out.endswith("14 in train.parquet, 2 in test.parquet\n")
    assert "GPU: got none" in err
    train, test = (read(gsm8k / "verl" / f"{part}.parquet").to_pylist() for part in ("train", "test"))
    for row in [*train, *test]:
        question = row["prompt"][-1]
        n = int(question["content"].removeprefix("What is ").removesuffix(" + 2?"))
        assert (question["role"], row["reward_model"]["ground_truth"]) == ("user", str(n + 2))
    assert len({row["prompt"][-1]["content"] for row in [*train, *test]}) == 16

    (gsm8k / "test.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": 2}) + "\n")
    example = runpy.run_path(str(EXAMPLES / "verl.py"))
    assert example["prepare"](gsm8k, gsm8k / "other") == {"train": 16, "test": 1}
    with pytest.raises(FileNotFoundError, match=r"--data: .* without train\.jsonl"):
        example["prepare"](gsm8k / "verl", gsm8k / "verl")

    def none(package: str) -> str:
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", none)
    with pytest.raises(ImportError, match=r"^pyarrow: got none installed"):
        example["prepare"](gsm8k, gsm8k / "verl")
    assert [line.partition(":")[0] for line in example["missing"]()] == ["verl", "ray", "GPU"]


def test_verl_prints_its_command_and_starts_nothing(
    gsm8k: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("verl.py", monkeypatch, "--data", str(gsm8k), "--model", "tiny", "--print", "trainer.total_epochs=3")
    words = shlex.split(capsys.readouterr().out.replace("\\\n", ""))
    assert words[1:3] == ["-m", "verl.trainer.main_ppo"]
    given = dict(word.split("=", 1) for word in words[3:])
    assert given["trainer.total_epochs"] == "3"  # the later of two
    assert given["actor_rollout_ref.model.path"] == "'tiny'"
    path = str((gsm8k / "verl" / "train.parquet").resolve()).replace("'", "\\'")
    assert given["data.train_files"] == f"'{path}'"
    assert [path.name for path in gsm8k.iterdir()] == ["train.jsonl"]
    with pytest.raises(SystemExit):
        run("verl.py", monkeypatch, "--data", str(gsm8k), "--model", "tiny", "--print", "--epochs=3")
    assert "'--epochs=3'" in capsys.readouterr().err


def test_verl_starts_from_any_folder_but_its_own(
    gsm8k: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pyarrow")
    started: list[list[str]] = []
    monkeypatch.setattr(subprocess, "call", lambda words: started.append(words) or 7)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("prefixloss.integrations.installed.check_version", lambda *_: None)
    for folder, code in ((EXAMPLES, 1), (gsm8k, 7)):
        monkeypatch.chdir(folder)
        with pytest.raises(SystemExit) as end:
            run("verl.py", monkeypatch, "--data", str(gsm8k), "--model", "tiny")
        assert end.value.code == code
    assert "Python takes verl.py for verl" in capsys.readouterr().err
    assert [words[1:3] for words in started] == [["-m", "verl.trainer.main_ppo"]]


def test_verl_gives_credit_up_to_the_first_wrong_step() -> None:
    """A right and a wrong response: the example's reward, and what its overrides name, called as verl calls them."""
    example = runpy.run_path(str(EXAMPLES / "verl.py"))
    score, given = example["compute_score"], example["VPPO"]
    texts = ["Step 1: 2+2=4\nStep 2: 4*3=12\nAnswer: 12", "Step 1: 2+2=4\nStep 2: 4*3=13\nAnswer: 13"]
    assert [score("", text, "12") for text in texts] == [1.0, 0.0]
    assert [score("", text, "1,200") for text in ("#### 1200", "\\boxed{1200}", "1200")] == [1.0, 1.0, 0.0]

    tokenizer = tiny_policy(16, 1).tokenizer
    ids = [tokenizer(text)["input_ids"] for text in texts]
    options = {name: given[f"+reward.prefixloss.{name}"] for name in ("detector", "steps")}
    threshold = float(given["+reward.prefixloss.threshold"])
    first_error = first_error_of(tokenizer, ids[1], "(2 + 2) * 3", "12", threshold=threshold, **options)
    assert tokenizer.decode(ids[1][first_error:]).lstrip().startswith("Step 2")

    length = max(map(len, ids))
    mask = torch.tensor([[k < len(row) for k in range(length)] for row in ids])
    rewards = torch.zeros(2, length)
    for k, (text, found) in enumerate(zip(texts, (-1, first_error), strict=True)):
        rewards[k, len(ids[k]) - 1] = signed_score(bool(score("", text, "12")), found)
    alpha, shorten = (float(given[f"+algorithm.vppo.{name}"]) for name in ("alpha", "shorten"))
    name, loss = given["algorithm.adv_estimator"], given["actor_rollout_ref.actor.policy_loss.loss_mode"]
    config = {name: {"alpha": alpha, "shorten": shorten}}
    a, _ = verl.ESTIMATORS[name](rewards, mask, config, index=["q", "q"])
    kept = first_error - int(shorten * len(ids[1]))
    assert kept > 0
    raw = torch.stack([torch.ones(length), alpha * (torch.arange(length) < kept)])
    want = (raw - (1 + alpha * kept / len(ids[1])) / 2) * mask
    torch.testing.assert_close(a, want)

    config = SimpleNamespace(
        clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=None, global_batch_info={}, get=lambda _, default: default
    )
    logps = torch.zeros(2, length)  # the ratio is 1, so the loss is the mean advantage
    out, _ = verl.POLICY_LOSSES[loss.removeprefix("prefix_")](logps, logps, a, mask, "token-mean", config)
    torch.testing.assert_close(out, -want.sum() / mask.sum())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="gloo is tested on Linux")
@pytest.mark.parametrize("processes", [1, 2])
def test_fsdp2(processes: int) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*(launcher if processes > 1 else [sys.executable]), str(EXAMPLES / "fsdp2.py"), "--steps", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["step 0", "step 1"]


def test_the_notebook_runs_top_to_bottom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = json.loads((EXAMPLES / "tour.ipynb").read_text())["cells"]
    namespace: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), namespace)
    assert namespace["first_error"].tolist() == [-1, 20, 0, -1]
    assert namespace["model"].lm_head.weight.grad.abs().sum() > 0
