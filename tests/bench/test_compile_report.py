"""The compile report: every kernel, five targets, no GPU; and what it reads out of listings."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# a loop of two blocks with a rare branch between them, as cuobjdump prints it: 2 loads of 16 bytes, 7 instructions on
# the short way around (the two of the rare branch do not count, nor does NOP)
SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.128.CONSTANT R8, desc[UR4][R2.64+0x10] ;
        /*0030*/                   MUFU.EX2 R4, R4 ;
        /*0040*/              @!P0 BRA 0x70 ;
        /*0050*/                   FSEL R4, R4, R5, P1 ;
        /*0060*/                   FSEL R5, R4, R5, P1 ;
        /*0070*/                   FADD R6, R6, R4 ;
        /*0080*/                   ISETP.NE.AND P1, PT, R0, RZ, PT ;
        /*0090*/                   NOP ;
        /*00a0*/               @P1 BRA 0x10 ;
        /*00b0*/                   STG.E [R2.64], R6 ;
        /*00c0*/                   EXIT ;
        /*00d0*/                   BRA 0xd0;
"""
# the same shape from AMD, closed by an unconditional branch with the way out in the middle, and a store in the loop
ASSEMBLY = """
kernel:
    s_load_dwordx4 s[0:3], s[4:5], 0x0
.LBB0_1:                                ; the loop
    global_load_dwordx2 v[0:1], v2, s[0:1]
    s_nop 0
    v_exp_f32_e32 v0, v0
    global_store_short v2, v0, s[2:3]
    s_cbranch_scc0 .LBB0_3
    s_branch .LBB0_1
.LBB0_3:
    s_endpgm
"""


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**clean, **env}, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_every_kernel_compiles_for_every_target_without_a_finding(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "bench.gpu.compile_report", "--json", str(report)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 findings" in done.stdout.splitlines()[-1]
    found = json.loads(report.read_text())["rows"]
    assert {row["target"] for row in found} == {"sm_80", "sm_90", "sm_100", "gfx942", "gfx950"}
    sources = (ast.parse(path.read_text()) for path in (ROOT / "csrc_triton").glob("*.py"))
    kernels = {node.name for tree in sources for node in tree.body if getattr(node, "name", "").endswith("_kernel")}
    assert {row["kernel"] for row in found} == kernels
    for row in found:
        assert row["spills"] == 0
        assert row["registers"] > 0
        assert 0 < row["occupancy"] <= 1
        # a kernel that goes over logits has its loops found, or nothing above would have been looked at
        loops = {"row_kernel": 1, "slice_kernel": 1, "gradient_kernel": 1}.get(row["kernel"], 0)
        assert len(row["instructions"]) >= loops, row


@pytest.fixture(scope="module")
def listings() -> dict[str, list[list]]:
    """What the report reads out of the two listings; in a process of its own, since it needs compiled kernels."""
    code = f"""
import json
from bench.gpu import compile_report as report
print(json.dumps({{"nvidia": report.nvidia_loops({SASS!r}), "amd": report.amd_loops({ASSEMBLY!r})}}))
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_loop_is_counted_on_the_shortest_way_around(listings: dict[str, list[list]]) -> None:
    assert listings["nvidia"] == [[7, [16, 16], []]]


def test_a_loop_closed_by_a_plain_branch_is_found_with_its_widths(listings: dict[str, list[list]]) -> None:
    # load, exp, store, the way out, the way back; s_nop is none
    assert listings["amd"] == [[5, [8], [2]]]


def test_what_is_wrong_with_a_kernel_is_said() -> None:
    code = """
from bench.gpu.compile_report import Loop, examine
wrong = {"registers": 255, "spills": 12, "shared": 0, "occupancy": 0.1, "loops": [Loop(90, [2, 2, 2, 2], [])]}
print(*examine("bf16", "sm_90", "row_kernel", wrong).findings, sep="\\n")
right = {"registers": 64, "spills": 0, "shared": 0, "occupancy": 0.5, "loops": [Loop(80, [16], [16])]}
print(examine("bf16", "sm_90", "row_kernel", dict(right)).findings)
# rows of an odd vocabulary start anywhere, and with chunk_tokens each is summed in one way
odd = {**right, "loops": [Loop(14, [2], [])]}
print(examine("odd vocabulary, chunk_tokens", "sm_90", "row_kernel", odd).findings)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    # 90 instructions for 8 bytes, which are 4 logits of bf16
    assert done.stdout.splitlines() == [
        "12 spills",
        "loads of 2 bytes",
        "22.5 instructions per logit in the statistics loop, more than 12",
        "['10.0 instructions per logit in the gradient loop, more than 8']",
        "[]",
    ]


def test_a_finding_ends_the_command_with_1() -> None:
    code = """
import sys
from bench.gpu import compile_report as report
report.CASES = {"bf16": report.CASES["bf16"]._replace(bounds=(1, 1, 1, 1))}
report.ProcessPoolExecutor = lambda **_: __import__("contextlib").nullcontext(type("Pool", (), {"map": map}))
sys.argv = ["compile_report", "--targets", "sm_90"]
report.main()
"""
    done = run_python(code)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "sm_90, bf16, row_kernel:" in done.stdout
    assert "1 configurations x 1 targets, 2 findings" in done.stdout


def test_gradients_leave_the_cache_first_unless_a_product_reads_them_next() -> None:
    code = """
import json, re
import triton
from bench.gpu import compile_report as report

triton.runtime.driver.set_active(report.NoDevice(report.TARGETS["sm_90"]))
found = {}
for name in ("bf16", "chunk, bf16", "gradient alone", "distil, reverse", "distil, chunk"):
    for _, kernel in report.compiled(report.CASES[name]):
        found[name] = re.findall(r"st[.]global([.\\w:]*)[.]v4", kernel.asm["ptx"])
print(json.dumps(found))
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(found.values())  # all are stored in 16 bytes
    for name, stores in found.items():
        assert set(stores) == {"" if "chunk" in name else ".cs"}, name
