"""How many small mistakes the tests notice: one operator, number or keyword of the package changed at a time.

    pip install cosmic-ray
    python tests/mutants.py --sample 200 --seed 0 --processes 2 --out mutants.jsonl

The mutants are cosmic-ray's, one of each family a line, without those that change annotations only. A mutant dies when
a test fails, or hangs. First the tests of its own module run; what lives then meets all tests of the loss. A test file
that kills is seen to pass without a mutant too. Each process has a copy of the package and forks a Python that has
torch loaded already: about a minute a mutant that dies, a quarter of an hour for one that lives.
"""

from __future__ import annotations

import argparse
import ast
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]

# the tests that are about a module, quickest first
CORE, KERNELS = ["test_backends", "test_contract_loss"], ["test_kernels", "test_half_precision", "test_triton_backend"]
TESTS_OF = {
    "prefixloss/advantages/first_error.py": ["test_advantages", "test_contract_advantages"],
    "prefixloss/advantages/groups.py": ["test_baselines", "test_advantages", "test_contract_advantages"],
    "prefixloss/advantages/outcomes.py": ["test_baselines", "test_contract_advantages"],
    "prefixloss/advantages/values.py": ["test_baselines"],
    "prefixloss/maths/objective.py": ["test_objective", *CORE],
    "prefixloss/maths/softmax.py": ["test_softmax", *CORE],
    "prefixloss/maths/objectives.py": ["test_objective", "test_new_objectives", *CORE],
    "prefixloss/maths/kl.py": ["test_objective", *CORE],
    "prefixloss/maths/corrections.py": ["test_objective", *CORE],
    "prefixloss/maths/reductions.py": CORE,
    "prefixloss/maths/derivatives.py": ["test_user_objectives", "test_objective", *CORE],
    "prefixloss/maths/trial.py": ["test_user_objectives"],
    "prefixloss/maths/divergence.py": ["test_divergence", "test_distill"],
    "prefixloss/inputs/token_advantages.py": ["test_advantages", *CORE],
    "prefixloss/inputs/kept.py": ["test_kept"],
    "prefixloss/backends/torch/kept.py": ["test_kept"],
    "prefixloss/backends/responses.py": ["test_user_objectives"],
    "prefixloss/backends/torch/entries.py": ["test_gradient_tolerance"],
    "prefixloss/inputs/reduction.py": CORE,
    "prefixloss/inputs/layout.py": ["test_check", "test_contract_errors", *CORE],
    "prefixloss/inputs/batch.py": ["test_check", "test_contract_errors", *CORE],
    "prefixloss/maths/metrics.py": ["test_metrics", *CORE],
    "prefixloss/backends/two_stages.py": CORE,
    "prefixloss/backends/autograd.py": ["test_retained_graph"],
    "prefixloss/door.py": ["test_check", "test_contract_errors", *CORE],
    "prefixloss/backends/torch/eager.py": ["test_retained_graph", "test_torch_backend", *CORE],
    "prefixloss/backends/torch/passes.py": ["test_retained_graph", "test_torch_backend", *CORE],
    "prefixloss/backends/torch/rows.py": ["test_batch_invariance", "test_torch_backend", *CORE],
    "prefixloss/backends/triton/problems.py": ["test_half_precision", "test_operators", "test_triton_backend"],
    "prefixloss/backends/triton/from_logits.py": ["test_operators", "test_triton_backend"],
    "prefixloss/backends/triton/from_head.py": ["test_half_precision", "test_operators", "test_triton_backend"],
    "prefixloss/backends/triton/scaling.py": ["test_retained_graph", "test_operators"],
    "prefixloss/backends/triton/loss.py": ["test_operators", "test_triton_backend"],
    "prefixloss/backends/triton/chunks.py": ["test_half_precision", "test_operators", "test_triton_backend"],
    "prefixloss/backends/products.py": ["test_products", "test_half_precision"],
    "csrc_triton/launch.py": KERNELS,
    "csrc_triton/tune.py": ["test_tune", *KERNELS],
    "csrc_triton/scale.py": ["test_retained_graph", *KERNELS],
    "csrc_triton/maths.py": KERNELS,
    "csrc_triton/objective.py": KERNELS,
    "csrc_triton/softmax.py": KERNELS,
    "csrc_triton/problem.py": KERNELS,
    "csrc_triton/access.py": KERNELS,
    "csrc_triton/first_pass.py": KERNELS,
    "csrc_triton/second_pass.py": KERNELS,
    "csrc_triton/rows.py": KERNELS,
}
ALL_OF_THE_LOSS = [
    "test_check", "test_config", "test_backends", "test_contract_errors", "test_torch_backend", "test_softmax",
    "test_objective", "test_products", "test_retained_graph", "test_batch_invariance", "test_half_precision",
    "test_kernels", "test_tune", "test_contract_loss", "test_contract_advantages", "test_torch_operators",
    "test_operators", "test_triton_backend", "test_new_objectives", "test_user_objectives", "test_kept",
    "test_gradient_tolerance", "test_sharded", "test_distill", "test_compile_report", "test_package",
]  # fmt: skip
SECONDS = 1800  # of one file's tests, four times what the longest takes; a mutant that takes longer hangs


class Mutant(NamedTuple):
    path: str
    line: int
    operator: str
    occurrence: int


def mutants() -> list[Mutant]:
    """The first of each family (binary operators, comparisons, numbers, ...) on each line."""
    from cosmic_ray import plugins  # noqa: PLC0415 (here, so that --help needs nothing)
    from cosmic_ray.ast import ast_nodes, get_ast  # noqa: PLC0415

    found: dict[tuple[str, int, str], Mutant] = {}
    for path in TESTS_OF:
        nodes = list(ast_nodes(get_ast((ROOT / path).read_text())))
        for name in plugins.operator_names():
            operator_type = plugins.get_operator(name)
            if operator_type.arguments():
                continue
            operator = operator_type()
            lines = [start[0] for node in nodes for start, _ in operator.mutation_positions(node)]
            for occurrence, line in enumerate(lines):
                found.setdefault((path, line, name.split("_")[0]), Mutant(path, line, name, occurrence))
    return list(found.values())


def changes_what_runs(mutant: Mutant) -> bool:
    source = (ROOT / mutant.path).read_text()
    return code_of(mutated(source, mutant.operator, mutant.occurrence)) not in (None, code_of(source))


def mutated(source: str, operator: str, occurrence: int) -> str:
    from cosmic_ray import plugins  # noqa: PLC0415
    from cosmic_ray.mutating import mutate_code  # noqa: PLC0415

    return mutate_code(source, plugins.get_operator(operator)(), occurrence) or source


def code_of(source: str) -> str | None:
    """What runs of a module: without annotations, which the package never evaluates; None if it is not Python."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        for field in ("annotation", "returns"):
            if getattr(node, field, None) is not None:
                setattr(node, field, ast.Constant(None))
    return ast.dump(tree)


def copy_of_the_project(folder: Path) -> Path:
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, files.split("\0")):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target, follow_symlinks=False)
    (folder / "prefixloss/_bench").symlink_to("../bench")
    return folder


def passes(folder: Path, name: str) -> bool:
    """Whether a test file passes on the copy, in a fork of this process."""
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        os.environ["PYTHONPATH"] = str(folder)  # for the processes that tests start
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        import pytest  # noqa: PLC0415

        quiet = ["-x", "-q", "-p", "no:randomly", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow"]
        os._exit(int(pytest.main([*quiet, str(next((folder / "tests").rglob(f"{name}.py")))])))
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def work(chosen: list[Mutant], out: Path) -> None:
    """One process's share; a line of `out` a mutant."""
    import numpy  # noqa: F401, PLC0415 (loaded once, for all forks)
    import torch  # noqa: PLC0415
    import triton  # noqa: F401, PLC0415

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = copy_of_the_project(Path(place))
        seen_to_pass: set[str] = set()  # without a mutant
        for mutant in chosen:
            source = (ROOT / mutant.path).read_text()
            changed = mutated(source, mutant.operator, mutant.occurrence)
            (folder / mutant.path).write_text(changed)
            tests = dict.fromkeys([*TESTS_OF[mutant.path], *ALL_OF_THE_LOSS])
            killer = next((test for test in tests if not passes(folder, test)), None)
            (folder / mutant.path).write_text(source)
            if killer is not None and killer not in seen_to_pass:
                if not passes(folder, killer):
                    raise SystemExit(f"{killer} fails without a mutant: what it says of mutants is worth nothing")
                seen_to_pass.add(killer)
            lines = zip(source.splitlines(), changed.splitlines(), strict=False)
            became = next((new.strip() for old, new in lines if old != new), "")
            with out.open("a") as file:
                file.write(json.dumps({**mutant._asdict(), "became": became, "killer": killer}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=200, help="mutants to try")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("mutants.jsonl"))
    given = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "1"
    every = mutants()
    random.Random(given.seed).shuffle(every)
    chosen = list(islice(filter(changes_what_runs, every), given.sample))
    print(f"{len(chosen)} mutants, of {len(every)} with those that change annotations only", flush=True)
    given.out.unlink(missing_ok=True)
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=work, args=(chosen[k :: given.processes], given.out.resolve()))
        for k in range(given.processes)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("stopped")
    results = [json.loads(line) for line in given.out.read_text().splitlines()]
    living = [r for r in results if r["killer"] is None]
    for mutant in living:
        print(f"lives: {mutant['path']}:{mutant['line']} {mutant['operator']}: {mutant['became']}")
    dead = len(results) - len(living)
    print(f"{dead} of {len(results)} mutants died ({100 * dead / max(1, len(results)):.1f} %)")


if __name__ == "__main__":
    main()
