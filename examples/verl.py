"""verl with credit up to the first wrong step (VPPO) on GSM8K or a data set like it: data, reward and configuration.

    python examples/verl.py --data gsm8k --model Qwen/Qwen3-0.6B            # writes the data, starts verl's main_ppo
    python examples/verl.py --data gsm8k --model Qwen/Qwen3-0.6B --print    # only shows the command

FOLDER has train.jsonl and, if you like, test.jsonl, whose lines are {"question": ..., "answer": "... #### 72"}. Words
behind these options are overrides of verl's own: `... trainer.total_epochs=3`. It needs the extra "detect", verl 0.9
with Ray and vLLM, and GPUs; without these it writes the data and says what is missing. What it costs on real hardware
was not measured: no run on a GPU was made.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from prefixloss.detect.maths.answers import states
from prefixloss.integrations import installed
from prefixloss.rl.task import Problem, load_problems, split

# the step markers are what the detector finds its steps by, "####" is what the reward reads
TASK = 'Solve the problem in steps, each on a line that begins with "Step" and its number. End with "#### ANSWER".'

# what makes it VPPO: docs/trainers/verl.md
VPPO = {
    "algorithm.adv_estimator": "vppo",
    "+algorithm.vppo.alpha": "0.5",
    "+algorithm.vppo.shorten": "0.1",
    "algorithm.use_kl_in_reward": "False",  # a reward carries the place of the first error
    "actor_rollout_ref.actor.policy_loss.loss_mode": "prefix_clip",
    "reward.reward_manager.name": "prefixloss",
    "+reward.prefixloss.detector": "maths",
    "+reward.prefixloss.steps": "markers",
    "+reward.prefixloss.threshold": "0.5",
    "actor_rollout_ref.model.use_fused_kernels": "True",
    "actor_rollout_ref.model.fused_kernel_options.impl_backend": "torch",
    "+ray_kwargs.ray_init.runtime_env.env_vars.PREFIXLOSS_VERL_HEAD": "'1'",  # our head, in every worker
}

# the rest of a run; every one can be overridden
RUN = {
    "data.train_batch_size": "128",  # of fewer problems verl makes no batch
    "data.max_prompt_length": "512",
    "data.max_response_length": "1024",
    "actor_rollout_ref.actor.ppo_mini_batch_size": "64",
    "actor_rollout_ref.actor.use_dynamic_bsz": "True",
    "actor_rollout_ref.rollout.name": "vllm",
    "actor_rollout_ref.rollout.n": "8",
    "actor_rollout_ref.rollout.tensor_model_parallel_size": "1",
    "trainer.logger": "[console]",
    "trainer.nnodes": "1",
    "trainer.total_epochs": "1",
    "trainer.test_freq": "20",
}


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    """verl's reward function: 1 for a response that states the right answer, else 0."""
    return float(states(solution_str, ground_truth))


def row(problem: Problem, index: int, part: str) -> dict[str, Any]:
    """What verl wants of a problem. The question stands alone: the detector reads the user's message as the problem."""
    return {
        "data_source": "prefixloss/example",
        "prompt": [{"role": "system", "content": TASK}, {"role": "user", "content": problem.question}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": problem.answer},
        "extra_info": {"split": part, "index": index},
    }


def prepare(folder: Path, out: Path) -> dict[str, int]:
    """Writes out/train.parquet and out/test.parquet and returns their lengths; without test.jsonl an eighth is held
    out. ImportError: pyarrow is missing."""
    installed.version("pyarrow")
    import pyarrow  # noqa: PLC0415
    import pyarrow.parquet  # noqa: PLC0415

    if not (folder / "train.jsonl").is_file():
        raise FileNotFoundError(f"--data: got {folder} without train.jsonl, expected a folder with it")
    train = load_problems(folder / "train.jsonl")
    if (folder / "test.jsonl").is_file():
        test = load_problems(folder / "test.jsonl")
    else:
        test, train = split(train, 1000)
    parts = {"train": train, "test": test}
    for part, problems in parts.items():
        if not problems:
            raise ValueError(f"--data: got no problem to {part} on in {folder}, expected two or more problems")
    out.mkdir(parents=True, exist_ok=True)
    for part, problems in parts.items():
        rows = [row(problem, index, part) for index, problem in enumerate(problems)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out / f"{part}.parquet")
    return {part: len(problems) for part, problems in parts.items()}


def quoted(text: str) -> str:
    """Any text as Hydra's overrides have it."""
    return "'" + text.replace("'", "\\'") + "'"


def command(model: str, out: Path, more: list[str]) -> list[str]:
    """verl's main_ppo with every override; of two for one name the later counts."""
    here = {
        "data.train_files": str(out / "train.parquet"),
        "data.val_files": str(out / "test.parquet"),
        "actor_rollout_ref.model.path": model,
        "reward.custom_reward_function.path": str(Path(__file__).resolve()),
        "reward.custom_reward_function.name": "compute_score",
        "trainer.default_local_dir": str(out / "checkpoints"),
    }
    gpus = {"trainer.n_gpus_per_node": str(max(1, torch.cuda.device_count()))}
    values = {**VPPO, **RUN, **gpus, **{name: quoted(value) for name, value in here.items()}}
    overrides = [f"{name}={value}" for name, value in values.items()]
    return [sys.executable, "-m", "verl.trainer.main_ppo", *overrides, *more]


def missing() -> list[str]:
    """What verl needs and does not find here."""
    lacks = []
    for package, first in {"verl": "0.9", "ray": "2.41"}.items():
        try:
            installed.check_version(package, first)
        except ImportError as error:
            lacks.append(str(error))
    return lacks if torch.cuda.is_available() else [*lacks, "GPU: got none, expected one or more"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--model", required=True, metavar="NAME")
    parser.add_argument("--out", type=Path, help="for parquet files and checkpoints; FOLDER/verl unless given")
    parser.add_argument("--print", action="store_true", help="show the command and write and start nothing")
    given, more = parser.parse_known_args()
    if wrong := [word for word in more if word.startswith("-") or "=" not in word]:
        parser.error(f"got {wrong[0]!r}, expected an option above or an override of verl's, NAME=VALUE")

    out = (given.out or given.data / "verl").resolve()
    whole = command(given.model, out, more)
    if given.print:
        print(" \\\n    ".join(shlex.quote(word) for word in whole))
        return
    lengths = prepare(given.data, out)
    print(f"{out}: " + ", ".join(f"{count} in {part}.parquet" for part, count in lengths.items()))
    if lacks := missing():
        parser.exit(1, "\n".join(["verl was not started; --print shows the command", *lacks, ""]))
    if Path.cwd() == Path(__file__).resolve().parent:
        parser.exit(1, "verl was not started: in this folder Python takes verl.py for verl; start it from another\n")
    raise SystemExit(subprocess.call(whole))


if __name__ == "__main__":
    main()
