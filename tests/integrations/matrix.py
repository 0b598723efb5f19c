"""The integrations' tests under other versions of TRL and transformers, each pair in an environment of its own.

    python tests/integrations/matrix.py

An environment has packages of its own only where they differ from those that run this; all others it shares. The table
in docs/versions-table.md is replaced when the last pair has run, or not at all.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import site
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs/versions-table.md"
HERE = "tests/integrations"
FUNCTION = [f"{HERE}/test_matrix.py"]
# one run of GRPO with and without the patch, the fused loss against TRL's, and a run of it with credit per token
TRAINERS = [
    f"{HERE}/test_integrations_trl.py::{name}"
    for name in (
        "test_a_trainer_runs_the_same_under_the_patch[grpo]",
        "test_a_trainer_runs_the_same_under_the_patch[rloo]",
        "test_the_fused_loss_has_trls_value_gradient_and_metrics[grpo-0.1]",
        "test_the_fused_loss_has_trls_value_gradient_and_metrics[dapo-0.0]",
        "test_losses_of_more_than_a_token_have_trls_value_gradient_and_metrics",
        "test_absolute_positions_are_those_of_generation",
        "test_every_token_gets_its_advantage[vppo-expected0]",
        "test_a_fused_run_is_trls_run[grpo]",
        "test_a_vppo_run_learns_through_the_fused_loss_as_through_trls",
    )
]
# from 1.15 on these take their log-probs from the same function
OTHERS = [f"{HERE}/test_integrations_trl.py::test_a_trainer_runs_the_same_under_the_patch[{n}]" for n in ("dpo", "sft")]
MODELS = [f"{HERE}/test_integrations_transformers.py"]


@dataclass(frozen=True)
class Pair:
    """Versions to install; None: no TRL, or the transformers that pip chooses beside TRL."""

    trl: str | None
    transformers: str | None
    tests: tuple[str, ...]
    # TRL's function is of Triton alone, which on a CPU runs in its interpreter
    interpret: bool = False


PAIRS = [
    Pair("1.9.2", "4.57.6", (*FUNCTION, *TRAINERS)),
    Pair("1.9.2", "5.16.1", (*FUNCTION, *TRAINERS)),
    Pair("1.12.0", "5.24.0", (*FUNCTION, *TRAINERS)),
    Pair("1.14.2", "5.24.0", (*FUNCTION, *TRAINERS)),
    Pair("1.15.0", "5.24.0", (*FUNCTION, *TRAINERS, *OTHERS), interpret=True),
    Pair("1.16.0", "4.57.6", (*FUNCTION, *TRAINERS, *OTHERS)),
    Pair("1.16.0", "5.24.0", (*FUNCTION, *TRAINERS, *OTHERS)),
    Pair(None, "4.57.6", tuple(MODELS)),
    Pair(None, "5.0.0", tuple(MODELS)),
    Pair(None, "5.12.1", tuple(MODELS)),
    Pair(None, "5.24.0", tuple(MODELS)),
]
HEAD = "| TRL | transformers | tokenizers | torch | tests |\n|---|---|---|---|---|\n"


@dataclass
class Row:
    """What a pair's run said."""

    pair: Pair
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    output: str = ""

    def line(self) -> str:
        found = [self.versions.get(name, "none") for name in ("trl", "transformers", "tokenizers", "torch")]
        counts = [(self.passed, "passed"), (self.failed, "failed"), (self.skipped, "skipped")]
        said = ", ".join(f"{n} {what}" for n, what in counts if n or what == "passed")
        return f"| {' | '.join(found if self.pair.trl else ['none', *found[1:]])} | {said} |\n"


def environment(folder: Path, packages: list[str]) -> str:
    """Its python: it sees all packages of this one, and has `packages`, and what they need in other versions, first."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = str(folder / "bin/python")
    code = "import site; print(site.getsitepackages()[0])"
    own = Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
    shared = "".join(f"import site; site.addsitedir({path!r})\n" for path in site.getsitepackages())
    (own / "shared.pth").write_text(shared)
    # named, so that pip looks for versions of them that go with the others
    beside = ["accelerate", "datasets", "peft", "requests"]
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-qq", *packages, *beside]
    subprocess.run(pip, check=True, timeout=600)
    return python


def run(pair: Pair, folder: Path) -> Row:
    """Makes the environment below `folder` and runs the pair's tests there, without network."""
    wanted = [f"{name}=={got}" for name, got in (("trl", pair.trl), ("transformers", pair.transformers)) if got]
    python = environment(folder / f"trl-{pair.trl}-transformers-{pair.transformers}", wanted)
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | ({"TRITON_INTERPRET": "1"} if pair.interpret else {})
    command = [python, "-m", "pytest", "-q", "-m", "not slow", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-k", "not table_in_the_docs and not compiled", *pair.tests]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, check=False, timeout=1800
    )
    names = ("trl", "transformers", "tokenizers", "torch")
    ask = f"import json; from importlib.metadata import version as v; print(json.dumps({{n: v(n) for n in {names}}}))"
    said = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout
    row = Row(pair, versions=json.loads(said), output=done.stdout + done.stderr)
    counts = re.findall(r"(\d+) (passed|failed|skipped)", done.stdout.rstrip().rpartition("\n")[2])
    for count, what in counts:
        setattr(row, what, int(count))
    if done.returncode and not row.failed:
        row.failed = 1  # it did not get as far as its tests
    return row


def write(rows: list[Row], table: Path) -> None:
    """Whole or not at all."""
    made = table.with_suffix(".part")
    made.write_text(HEAD + "".join(row.line() for row in rows))
    made.replace(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="pairs whose `trl-...-transformers-...` has this in it; writes no table")
    only = parser.parse_args().only
    rows = []
    for pair in PAIRS:
        name = f"trl-{pair.trl}-transformers-{pair.transformers}"
        if only and only not in name:
            continue
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            rows.append(run(pair, Path(folder)))
        print(f"{name}: {rows[-1].line().strip()} in {time.perf_counter() - start:.0f} s", flush=True)
        if rows[-1].failed:
            print(rows[-1].output)
    if not only:
        write(rows, TABLE)
    return min(sum(row.failed for row in rows), 1)


if __name__ == "__main__":
    sys.exit(main())
