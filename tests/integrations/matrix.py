"""The integrations' tests under other versions of trainers and transformers, each pair in an environment of its own.

    python tests/integrations/matrix.py

An environment has packages of its own only where they differ from those that run this; all others it shares. The rows
of the pairs that ran are replaced in docs/versions-table.md when the last of them has run, or none.
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
NAMES = {"trl": "TRL", "verl": "verl", "openrlhf": "OpenRLHF", "skyrl": "SkyRL"}
BESIDE = ("tokenizers", "torch")
OTHER = f"{HERE}/test_integrations_others.py"


@dataclass(frozen=True)
class Pair:
    """Versions to install, of a trainer or "none" and of transformers."""

    trainer: str
    version: str
    transformers: str
    tests: tuple[str, ...]
    # TRL's function is of Triton alone, which on a CPU runs in its interpreter
    interpret: bool = False
    # what the trainer imports beside what it declares, or in its place where it declares what needs a GPU
    beside: tuple[str, ...] = ()
    # packages that are installed without what they declare
    alone: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.trainer}-{self.version}-transformers-{self.transformers}"

    @property
    def packages(self) -> list[str]:
        own = [f"{self.trainer}=={self.version}"] if self.version and not self.alone else []
        return [*own, f"transformers=={self.transformers}", *self.beside]

    @property
    def keyword(self) -> str:
        """pytest's -k: of the other trainers one file has the tests."""
        of_trainer = "" if self.trainer in ("trl", "none") else f" and {self.trainer}"
        return f"not table_in_the_docs and not compiled{of_trainer}"


def trl(version: str, transformers: str, *more: str, interpret: bool = False) -> Pair:
    return Pair("trl", version, transformers, (*FUNCTION, *TRAINERS, *more), interpret)


OPENRLHF = (
    "ray==2.55.0",
    "torchdata",
    "optree",
    "einops",
    "jsonlines",
    "loralib",
    "pylatexenc",
    "torchmetrics",
    "aiohttp",
)
SKYRL = ("ray", "cloudpathlib", "jaxtyping", "loguru", "omegaconf")
PAIRS = [
    trl("1.9.2", "4.57.6"),
    trl("1.9.2", "5.16.1"),
    trl("1.12.0", "5.24.0"),
    trl("1.14.2", "5.24.0"),
    trl("1.15.0", "5.24.0", *OTHERS, interpret=True),
    trl("1.16.0", "4.57.6", *OTHERS),
    trl("1.16.0", "5.24.0", *OTHERS),
    Pair("openrlhf", "0.11.2", "5.15.0", (OTHER,), beside=OPENRLHF, alone=("openrlhf==0.11.2",)),
    Pair("skyrl", "0.3.0", "5.8.0", (OTHER,), beside=SKYRL, alone=("skyrl==0.3.0", "skyrl-gym")),
    Pair("none", "", "4.57.6", tuple(MODELS)),
    Pair("none", "", "5.0.0", tuple(MODELS)),
    Pair("none", "", "5.12.1", tuple(MODELS)),
    Pair("none", "", "5.24.0", tuple(MODELS)),
]
HEAD = "| trainer | transformers | tokenizers | torch | tests |\n|---|---|---|---|---|\n"


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
        counts = [(self.passed, "passed"), (self.failed, "failed"), (self.skipped, "skipped")]
        said = ", ".join(f"{n} {what}" for n, what in counts if n or what == "passed")
        return start(self.pair, self.versions) + f" {' | '.join(self.versions[name] for name in BESIDE)} | {said} |\n"


def start(pair: Pair, versions: dict[str, str]) -> str:
    """Of a pair's row in the table."""
    trainer = f"{NAMES[pair.trainer]} {versions[pair.trainer]}" if pair.version else "none"
    return f"| {trainer} | {versions['transformers']} |"


def environment(folder: Path, packages: list[str], alone: tuple[str, ...] = ()) -> str:
    """Its python: it sees all packages of this one, and has `packages`, and what they need in other versions, first;
    those `alone` without what they need."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = str(folder / "bin/python")
    code = "import site; print(site.getsitepackages()[0])"
    own = Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
    shared = "".join(f"import site; site.addsitedir({path!r})\n" for path in site.getsitepackages())
    (own / "shared.pth").write_text(shared)
    # named, so that pip looks for versions of them that go with the others
    beside = ["accelerate", "datasets", "peft", "requests"]
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-qq"]
    subprocess.run([*pip, *packages, *beside], check=True, timeout=600)
    if alone:
        subprocess.run([*pip, "--no-deps", *alone], check=True, timeout=600)
    return python


def run(pair: Pair, folder: Path) -> Row:
    """Makes the environment below `folder` and runs the pair's tests there, without network."""
    python = environment(folder / pair.name, pair.packages, pair.alone)
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | ({"TRITON_INTERPRET": "1"} if pair.interpret else {})
    command = [python, "-m", "pytest", "-q", "-m", "not slow", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-k", pair.keyword, *pair.tests]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, check=False, timeout=1800
    )
    names = ("transformers", *BESIDE, *([pair.trainer] if pair.version else []))
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
    """The rows, in the order of the pairs; a pair that has not run keeps its row. Whole or not at all."""
    before = table.read_text().splitlines(keepends=True) if table.exists() else []
    lines = []
    for pair in PAIRS:
        kept = start(pair, {pair.trainer: pair.version, "transformers": pair.transformers})
        now = [row.line() for row in rows if row.pair == pair]
        lines += now or [line for line in before if line.startswith(kept)]
    made = table.with_suffix(".part")
    made.write_text(HEAD + "".join(lines))
    made.replace(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="pairs whose name, such as trl-1.9.2-transformers-5.16.1, has this")
    only = parser.parse_args().only
    rows = []
    for pair in PAIRS:
        if only not in pair.name:
            continue
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            rows.append(run(pair, Path(folder)))
        print(f"{pair.name}: {rows[-1].line().strip()} in {time.perf_counter() - start:.0f} s", flush=True)
        if rows[-1].failed:
            print(rows[-1].output)
    write(rows, TABLE)
    return min(sum(row.failed for row in rows), 1)


if __name__ == "__main__":
    sys.exit(main())
