"""Compiles every kernel for five GPUs on a machine without one, and reads what the compilers made of it.

    python -m bench.gpu.compile_report [--json FILE] [--targets sm_90 gfx942]

The package's own launchers run under a driver that launches nothing, so that what is read is what ships. For each
kernel: registers, spills, shared memory, occupancy, the widths of its loads and stores of logits, and, in the loops
over a row, instructions per logit. It exits with 1 on a spill, on a load of logits narrower than 16 bytes where
there could be wider ones, and on more instructions per logit than a case's `bounds` allow.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from bisect import bisect_left
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled

import networkx
import torch
import triton
from triton.backends.compiler import GPUTarget

from prefixloss import LossConfig
from prefixloss._kernels import entries, rows, scale
from prefixloss._kernels.distill import Rows, launch_distill
from prefixloss._kernels.problem import Problem, Tokens
from prefixloss.backends.triton import distill, parts, problems
from prefixloss.inputs.distillation import Teacher

from ..files import write_json

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
# KiB of shared memory a multiprocessor
SHARED = {"sm_80": 164, "sm_90": 228, "sm_100": 228, "gfx942": 64, "gfx950": 160}
ROWS, VOCABULARY = 4, 151_936
NARROWEST = 16  # bytes a load of logits

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


class Case(NamedTuple):
    """A configuration that ships. run: "row", "split" (slices, combination, gradient), "parts" (the same,
    of a vocabulary that is split over processes), "gradient" (its own kernel), "entries" (the choice of a few and their
    products), "scale" or "distill".

    chunk: logits are a float32 chunk made from hidden states, and gradients lie in the same memory. divergence, listed:
    of a distillation, and whether its teacher lists ids. bounds: the most instructions per logit in the loops for
    statistics and gradient, NVIDIA's and then AMD's; a tenth above what the worst of Triton 3.6 to 3.9 made.
    """

    run: str = "row"
    logits: torch.dtype = BF16
    grads: torch.dtype = BF16
    options: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    terms: bool = True
    gradient: bool = True
    chunk: bool = False
    divergence: str = ""
    listed: bool = False
    vocabulary: int = VOCABULARY
    bounds: tuple[int, int, int, int] = (12, 8, 12, 13)


PENALTIES = {"kl": "full", "kl_coef": 0.1, "entropy_coef": 0.1}
EVERYTHING = {
    "kl": "k3", "kl_coef": 0.1, "kl_importance": True, "sampler_correction": "tis", "dual_clip": 3.0, "ratio_cap": 2.0
}  # fmt: skip
CASES = {
    "bf16": Case(),
    "fp16": Case(logits=F16, grads=F16, bounds=(12, 8, 12, 9)),
    "fp32": Case(logits=F32, grads=F32, bounds=(18, 9, 16, 9)),
    "softcap": Case(options={"softcap": 30.0}, bounds=(34, 37, 36, 40)),
    "entropy": Case(options={"entropy_coef": 0.1}, bounds=(12, 14, 12, 17)),
    "exact KL": Case(options={"kl": "full", "kl_coef": 0.1}, bounds=(28, 20, 28, 21)),
    "exact KL, entropy, softcap": Case(options={**PENALTIES, "softcap": 30.0}, bounds=(71, 69, 76, 71)),
    "k3, tis, caps": Case(options=EVERYTHING),
    "k1, icepop": Case(options={"kl": "k1", "kl_coef": 0.1, "sampler_correction": "icepop"}),
    "k2": Case(options={"kl": "k2", "kl_coef": 0.1}),
    "cispo": Case(options={"objective": "cispo", "clip_high": 5.0}),
    "sapo": Case(options={"objective": "sapo"}),
    "topr": Case(options={"objective": "topr"}),
    "reinforce": Case(options={"objective": "reinforce"}),
    "statistics": Case(terms=False, gradient=False),
    "loss alone": Case(gradient=False),
    "gradient alone": Case(run="gradient"),
    "few rows": Case(run="split"),
    "few rows, exact KL, entropy": Case(run="split", options=PENALTIES, bounds=(27, 20, 28, 21)),
    "small vocabulary": Case(vocabulary=1_024, bounds=(13, 9, 14, 14)),
    "odd vocabulary": Case(vocabulary=50_257),
    "odd vocabulary, few rows": Case(run="split", vocabulary=50_257),
    "odd vocabulary, chunk_tokens": Case(options={"chunk_tokens": 1024}, vocabulary=50_257, bounds=(32, 22, 34, 34)),
    "chunk, bf16": Case(logits=F32, chunk=True, bounds=(11, 8, 13, 13)),
    "chunk, fp16": Case(logits=F32, grads=F16, chunk=True, bounds=(12, 8, 13, 9)),
    "chunk, fp32": Case(logits=F32, grads=F32, chunk=True, bounds=(18, 9, 16, 9)),
    "chunk, exact KL, entropy": Case(logits=F32, options=PENALTIES, chunk=True, bounds=(25, 18, 28, 20)),
    "chunk, gradient alone": Case(run="gradient", logits=F32, chunk=True),
    "chunk, statistics": Case(logits=F32, terms=False, gradient=False, chunk=True, bounds=(14, 8, 16, 13)),
    "chunk, four processes": Case(run="parts", logits=F32, chunk=True, bounds=(14, 8, 16, 13)),
    "chunk, four processes, exact KL, entropy": Case(
        run="parts", logits=F32, options=PENALTIES, chunk=True, bounds=(30, 20, 30, 20)
    ),
    "chunk, entries, bf16": Case(run="entries", logits=F32, chunk=True, bounds=(30, 0, 24, 0)),
    "chunk, entries, fp32": Case(run="entries", logits=F32, grads=F32, chunk=True, bounds=(26, 0, 27, 0)),
    "chunk, entries, exact KL, entropy": Case(
        run="entries", logits=F32, options=PENALTIES, chunk=True, bounds=(42, 0, 34, 0)
    ),
    "distil, reverse": Case(run="distill", divergence="reverse", bounds=(28, 25, 28, 27)),
    "distil, jsd": Case(run="distill", divergence="jsd", bounds=(67, 60, 53, 53)),
    "distil, softcap": Case(run="distill", divergence="forward", options={"softcap": 30.0}, bounds=(72, 74, 80, 94)),
    "distil, list": Case(run="distill", divergence="skew-reverse", listed=True, bounds=(11, 12, 12, 15)),
    "distil, chunk": Case(run="distill", divergence="skew-forward", logits=F32, chunk=True, bounds=(66, 36, 62, 49)),
    "distil, chunk, fp16": Case(
        run="distill", divergence="reverse", logits=F32, grads=F16, chunk=True, bounds=(24, 22, 29, 22)
    ),
    "distil, chunk, list": Case(
        run="distill", divergence="reverse", logits=F32, chunk=True, listed=True, bounds=(10, 11, 13, 15)
    ),
    "scale, bf16": Case(run="scale"),
    "scale, fp32": Case(run="scale", logits=F32),
}


@dataclass(frozen=True)
class Row:
    """What one kernel became on one target. instructions: per logit in each of the row's loops."""

    case: str
    target: str
    kernel: str
    registers: int
    spills: int
    shared: int
    occupancy: float
    loads: list[int]
    stores: list[int]
    instructions: dict[str, float]
    findings: list[str]


class Loop(NamedTuple):
    """A loop over a row: how many instructions, and the widths in bytes of its loads and stores of global memory."""

    instructions: int
    loads: list[int]
    stores: list[int]


# --- compiling without a device


class NoDevice:
    """A driver that knows what to compile for and has nothing to run on."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return list(TARGETS.values()).index(self.target)

    def get_current_stream(self, _: int | None = None) -> int:
        return 0

    def is_active(self) -> bool:
        return True


def compiled(case: Case) -> list[tuple[str, Any]]:
    """The kernels that a case launches, by name, compiled for the active driver's target."""
    made: list[tuple[str, Any]] = []
    run = triton.runtime.jit.JITFunction.run

    def compile_only(self: Any, *args: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, warmup=True, **options)
        made.append((self.__name__, kernel))
        return kernel

    triton.runtime.jit.JITFunction.run = compile_only
    try:
        launch(case)
    finally:
        triton.runtime.jit.JITFunction.run = run
    return made


def launch(case: Case) -> None:
    """Calls the package's launchers as its operators do."""
    logits = torch.empty(ROWS, case.vocabulary, dtype=case.logits)
    if case.run == "scale":
        return scale.launch_scale(logits, torch.ones(()))
    if case.run == "distill":
        return distilled(case, logits)
    config = LossConfig(**case.options)
    stats, terms = torch.zeros(7, ROWS), torch.zeros(6, ROWS)
    ids = torch.zeros(ROWS, dtype=torch.int64)
    tokens = Tokens(ids, ids.to(torch.uint8), torch.zeros(5, ROWS), ids)
    own_width = case.logits == case.grads
    work = {
        "terms": case.terms and case.run != "gradient",
        "gradient": case.gradient,
        "clear": True,
        "indexed": case.chunk,
        "narrowed": not own_width,
        "rescaled": case.chunk and case.grads == F16,
    }
    problem = problems.problem_of(config, logits, logits, tokens, True, case.grads, **work)
    grads = logits if own_width else logits.view(case.grads)[:, case.vocabulary :]
    if case.run == "row":
        rows.launch_rows(problem, stats, terms, grads, stats)
    elif case.run == "entries":
        _launch_entries(problem, stats, terms[3:], case.grads)
    elif case.run == "gradient":
        rows.launch_gradient(problem, stats, terms[3:], grads, stats, 1)
    elif case.run == "parts":
        sums = torch.stack([parts.slices(problem)] * 4)
        parts.combine(problem, sums, ids >= 0, stats, terms)
        rows.launch_gradient(problem, stats, terms[3:], grads, stats, 1)
    else:
        sums = torch.zeros(6, ROWS, 4)
        rows.launch_slices(problem, sums)
        rows.launch_combine(problem, sums, stats, terms)
        rows.launch_gradient(problem, stats, terms[3:], grads, stats, 4)
    return None


def _launch_entries(problem: Problem, stats: torch.Tensor, coefficients: torch.Tensor, dtype: torch.dtype) -> None:
    width, (columns, values) = 4096, torch.empty(2, ROWS, entries.CAPACITY)
    columns, counts = columns.to(torch.int32), torch.zeros(ROWS, dtype=torch.int32)
    entries.launch_measure(problem, stats, coefficients, stats)
    entries.launch_select(problem, stats, coefficients, torch.ones(()), columns, values, counts, stats)
    entries.launch_gather(columns, values, counts, torch.empty(ROWS, width, dtype=dtype), torch.empty(ROWS, width))
    ends = rows_of = torch.zeros(ROWS, dtype=torch.int64)
    hidden, total = torch.empty(ROWS, width, dtype=dtype), torch.empty(ROWS, width)
    entries.launch_scatter(counts, ends, rows_of, values[0], hidden, total)


def distilled(case: Case, logits: torch.Tensor) -> None:
    """A distillation, of 20 ids where the teacher lists some."""
    config, tokens, own_width = LossConfig(**case.options), torch.arange(ROWS), case.logits == case.grads
    work = {"narrowed": not own_width, "rescaled": case.chunk and case.grads == F16, "chunk": case.chunk}
    kind = distill._Kind(case.divergence, 0.5, config.encoded, config.encoded)
    rows_of = Rows(tokens, torch.zeros(ROWS), torch.ones(ROWS))
    teacher = None if case.listed else logits
    problem = distill._problem(kind, logits, teacher, rows_of, case.grads, gradient=True, **work)
    if case.listed:
        said = Teacher(ids=torch.arange(20).expand(ROWS, 20), logps=torch.full((ROWS, 20), -9.0))
        listed, count = distill._listed(said, tokens, case.vocabulary)
        problem = replace(problem, listed=listed, count=count)
    grads = logits if own_width else logits.view(case.grads)[:, case.vocabulary :]
    launch_distill(problem, grads, torch.zeros(ROWS))


# --- reading what was compiled


def nvidia_loops(sass: str) -> list[Loop]:
    """The loops over a row in the output of `cuobjdump -sass`."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)]
    jumps: dict[int, tuple[int | None, bool]] = {}
    for at, text in code:
        if jump := re.search(r"(@\S+ )?\bBRA\S* (?:.*, )?0x([0-9a-f]+)", text):
            jumps[at] = (int(jump[2], 16), jump[1] is not None)
        elif re.match(r"(EXIT|RET)", text):
            jumps[at] = (None, False)
    found = []
    for body in _loops([(at, text) for at, text in code if "NOP" not in text], jumps):
        if any("MUFU.EX2" in text for text in body):
            loads = [_nvidia_width(m) for text in body for m in re.findall(r"\bLDG(\S*)", text)]
            stores = [_nvidia_width(m) for text in body for m in re.findall(r"\bSTG(\S*)", text)]
            found.append(Loop(len(body), loads, stores))
    return found


def _nvidia_width(suffix: str) -> int:
    widths = {".128": 16, ".64": 8, ".U16": 2, ".S16": 2, ".U8": 1, ".S8": 1}
    return next((width for mark, width in widths.items() if mark in suffix), 4)


def amd_loops(assembly: str) -> list[Loop]:
    """The loops over a row in an AMD listing."""
    lines = [line.split(";")[0].strip() for line in assembly.splitlines()]
    labels = {line[:-1]: at for at, line in enumerate(lines) if re.fullmatch(r"\.LBB\w+:", line)}
    jumps: dict[int, tuple[int | None, bool]] = {}
    for at, line in enumerate(lines):
        if jump := re.match(r"s_(c?)branch\S*\s+(\.LBB\w+)", line):
            jumps[at] = (labels[jump[2]], jump[1] == "c")
        elif line.startswith("s_endpgm"):
            jumps[at] = (None, False)
    found = []
    is_code = re.compile(r"[a-z]\w+(\s|$)")
    for body in _loops(
        [(at, text) for at, text in enumerate(lines) if is_code.match(text) and "s_nop" not in text], jumps
    ):
        if any("v_exp_f32" in line for line in body):
            memory = [m for m in (re.match(r"(?:global|buffer|flat)_(load|store)_(\w+)", line) for line in body) if m]
            widths = {kind: [_amd_width(m[2]) for m in memory if m[1] == kind] for kind in ("load", "store")}
            found.append(Loop(len(body), widths["load"], widths["store"]))
    return found


def _amd_width(kind: str) -> int:
    widths = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "ushort": 2, "byte": 1, "ubyte": 1}
    return widths.get(re.sub(r"^s(?=short|byte)|_d16.*$", "", kind), 4)


def _loops(code: list[tuple[int, str]], jumps: dict[int, tuple[int | None, bool]]) -> list[list[str]]:
    """The instructions of each loop, on the shortest way around it.

    jumps: by address, where to (None: the end) and whether on a condition. The block that has the target in it does a
    little more, once a row, behind such a condition: that is no part of the shortest way.
    """
    places = [at for at, _ in code]
    ahead = {
        at: places[min(bisect_left(places, to), len(places) - 1)] for at, (to, _) in jumps.items() if to is not None
    }
    leaders = sorted({places[0], *ahead.values(), *(after for at, after in pairwise(places) if at in jumps)})
    blocks = {
        first: [(at, text) for at, text in code[bisect_left(places, first) : bisect_left(places, last)]]
        for first, last in pairwise([*leaders, places[-1] + 1])
    }
    graph = networkx.DiGraph()
    for first, after in zip(leaders, [*leaders[1:], None], strict=True):
        end = blocks[first][-1][0]
        _, conditional = jumps.get(end, (None, True))
        following = {ahead[end]} if end in ahead else set()
        if conditional and after is not None:
            following.add(after)
        graph.add_edges_from((first, to, {"cost": len(blocks[to])}) for to in following)
    found = []
    for part in networkx.strongly_connected_components(graph):
        loop = graph.subgraph(part)
        # from the block with the row's loads on and back to it
        start = max(part, key=lambda first: len([t for _, t in blocks[first] if re.search(r"LDG|_load_", t)]))
        ways = [networkx.dijkstra_path(loop, to, start, weight="cost") for to in loop.successors(start)]
        if ways:
            way = min(ways, key=lambda way: sum(len(blocks[first]) for first in way))
            found.append([text for first in way for _, text in blocks[first]])
    return found


def read_nvidia(kernel: Any, target: str) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, sass = (_cuobjdump(flag, file.name) for flag in ("-res-usage", "-sass"))
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    moves = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    warps = kernel.metadata.num_warps
    a_warp = -(-used["REG"] // 8) * 8 * 32
    blocks = min(65_536 // (a_warp * warps), 64 // warps, SHARED[target] * 1024 // (used["SHARED"] + 1024), 32)
    return {
        "registers": used["REG"],
        "spills": used["LOCAL"] + used["STACK"] + moves,
        "shared": used["SHARED"],
        "occupancy": blocks * warps / 64,
        "loops": nvidia_loops(sass),
    }


def _cuobjdump(flag: str, file: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, flag, file], capture_output=True, text=True, check=True).stdout


def read_amd(kernel: Any, target: str) -> dict[str, Any]:
    assembly = kernel.asm["amdgcn"]
    keys = "vgpr_count|vgpr_spill_count|sgpr_spill_count|group_segment_fixed_size|private_segment_fixed_size"
    used = {key: int(value) for key, value in re.findall(rf"\.({keys}):\s+(\d+)", assembly)}
    warps = kernel.metadata.num_warps
    waves = 4 * min(8, 512 // max(8, -(-used["vgpr_count"] // 8) * 8))
    blocks = min(waves // warps, SHARED[target] * 1024 // max(1, used["group_segment_fixed_size"]))
    return {
        "registers": used["vgpr_count"],
        "spills": used["vgpr_spill_count"] + used["sgpr_spill_count"] + used["private_segment_fixed_size"],
        "shared": used["group_segment_fixed_size"],
        "occupancy": blocks * warps / 32,
        "loops": amd_loops(assembly),
    }


def examine(name: str, target: str, kernel: str, found: dict[str, Any]) -> Row:
    """One line of the report, with what is wrong about it."""
    case = CASES[name]
    models = 2 if case.options.get("kl") == "full" or (case.divergence and not case.listed) else 1
    loops = [_of_logits(loop) if case.listed else loop for loop in found.pop("loops") if loop.loads]
    loads = sorted({width for loop in loops for width in loop.loads})
    stores = sorted({width for loop in loops for width in loop.stores})
    findings = []
    if found["spills"]:
        findings.append(f"{found['spills']} spills")
    if _by_vectors(case) and loads and loads[0] < NARROWEST:
        findings.append(f"loads of {loads[0]} bytes")
    instructions: dict[str, float] = {}
    for loop in sorted(loops, key=lambda loop: bool(loop.stores)):
        kind = "gradient" if loop.stores else "statistics"
        a_logit = round(loop.instructions * case.logits.itemsize * models / sum(loop.loads), 2)
        instructions[kind] = max(a_logit, instructions.get(kind, 0.0))
        bound = case.bounds[(0 if target.startswith("sm") else 2) + (kind == "gradient")]
        if a_logit > bound:
            findings.append(f"{a_logit} instructions per logit in the {kind} loop, more than {bound}")
    return Row(name, target, kernel, loads=loads, stores=stores, instructions=instructions, findings=findings, **found)


def _of_logits(loop: Loop) -> Loop:
    """Without the loads of one listed id, the next, on each way to it."""
    ids = [width for width in loop.loads if width == 4][:2]
    return loop._replace(loads=[width for width in loop.loads if width != 4] + [4] * (loop.loads.count(4) - len(ids)))


def _by_vectors(case: Case) -> bool:
    """Whether rows are read by 16 bytes: not where they start anywhere and a token's bits may not depend on it."""
    return case.vocabulary * case.logits.itemsize % NARROWEST == 0 or "chunk_tokens" not in case.options


# --- the report


def report(target: str) -> list[Row]:
    """All cases on one target."""
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    triton.runtime.driver.set_active(NoDevice(TARGETS[target]))
    read = read_nvidia if target.startswith("sm") else read_amd
    found = []
    for name, case in CASES.items():
        for kernel_name, kernel in compiled(case):
            found.append(examine(name, target, kernel_name, read(kernel, target)))
    return found


def lines(found: list[Row]) -> Iterator[str]:
    """The table."""
    head = ("case", "kernel", "target", "regs", "spills", "shared", "occup.", "loads", "stores", "instr./logit")
    widths = (27, 16, 7, 4, 6, 6, 6, 6, 7, 24)
    yield "  ".join(f"{text:<{width}}" for text, width in zip(head, widths, strict=True))
    order = {name: at for at, name in enumerate(CASES)}
    for row in sorted(found, key=lambda row: (order[row.case], row.kernel)):
        cells = (
            row.case, row.kernel, row.target, row.registers, row.spills, row.shared, f"{row.occupancy:.0%}",
            "/".join(map(str, row.loads)), "/".join(map(str, row.stores)),
            ", ".join(f"{kind} {count:g}" for kind, count in row.instructions.items()),
        )  # fmt: skip
        yield "  ".join(f"{cell!s:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    arguments = parser.parse_args()
    start = time.perf_counter()
    with ProcessPoolExecutor(max_workers=2, mp_context=get_context("spawn")) as pool:
        found = [row for part in pool.map(report, arguments.targets) for row in part]
    print(*lines(found), sep="\n")
    findings = [f"{row.target}, {row.case}, {row.kernel}: {text}" for row in found for text in row.findings]
    print("", *findings, sep="\n")
    took = time.perf_counter() - start
    count = f"{len(CASES)} configurations x {len(arguments.targets)} targets, {len(findings)} findings"
    print(f"compile report: {count}, triton {triton.__version__}, {took:.0f} s")
    if arguments.json:
        record = {"triton": triton.__version__, "seconds": round(took), "rows": [asdict(row) for row in found]}
        write_json(arguments.json, record)
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    main()
