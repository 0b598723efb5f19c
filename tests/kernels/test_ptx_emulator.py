"""The emulator itself, on a few lines of PTX written by hand: what it computes, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_emulator import BarrierError, MemoryAccessError, RaceError, UninitialisedError, UnknownInstructionError
from ptx_emulator.errors import EmulationError
from ptx_emulator.instructions import operation
from ptx_emulator.machine import Code, Launch
from ptx_emulator.numbers import Noise, decode, encode, fused, to_bf16
from ptx_emulator.parser import parse

THREADS = 64
# %rd1: the thread's own 4 bytes of its program's part of the output
PROLOGUE = """
    ld.param.b64 %rd0, [out];
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, %ctaid.x;
    mad.lo.s32 %r2, %r1, 64, %r0;
    mad.wide.s32 %rd1, %r2, 4, %rd0;
"""


def run(body: str, programs: int = 1, shared: int = 256) -> np.ndarray:
    """The output [programs, threads] as int32, -1 where nothing was written."""
    text = f".visible .entry test(\n\t.param .u64 out\n)\n.reqntid {THREADS}\n{{\n{PROLOGUE}{body}\n}}\n"
    out = np.full(programs * THREADS, -1, np.int32)
    start = out.ctypes.data
    regions = [(start, out.view(np.uint8))]
    Code(parse(text), Noise(0)).run(Launch((np.array([start], np.uint64),), (programs, 1, 1), shared, regions))
    return out.reshape(programs, THREADS)


STORE = "st.global.b32 [%rd1], %r3;\nret;"


def test_every_thread_of_every_program_has_its_number() -> None:
    out = run("mov.b32 %r3, %r2;" + STORE, programs=5)
    assert out.tolist() == np.arange(5 * THREADS).reshape(5, THREADS).tolist()


def test_threads_that_take_different_ways_meet_again() -> None:
    # thread t goes t % 5 times around, then all exchange what they have
    out = run(f"""
        rem.s32 %r4, %r0, 5;
        mov.b32 %r3, 0;
    $L_loop:
        setp.ge.s32 %p1, %r3, %r4;
        @%p1 bra $L_end;
        add.s32 %r3, %r3, 1;
        bra.uni $L_loop;
    $L_end:
        bar.sync 0;
        shfl.sync.bfly.b32 %r3, %r3, 1, 31, -1;
        {STORE}""")
    assert out[0].tolist() == [(t ^ 1) % 5 for t in range(THREADS)]


def test_values_pass_through_shared_memory_behind_a_barrier() -> None:
    exchange = """
        mov.b32 %r4, global_smem;
        shl.b32 %r5, %r0, 2;
        add.s32 %r6, %r4, %r5;
        st.shared.b32 [%r6], %r2;
        {barrier}
        xor.b32 %r7, %r5, 128;
        add.s32 %r8, %r4, %r7;
        ld.shared.b32 %r3, [%r8];
        """
    out = run(exchange.format(barrier="bar.sync 0;") + STORE, programs=3)
    assert out.tolist() == [[64 * program + (t ^ 32) for t in range(THREADS)] for program in range(3)]
    with pytest.raises(RaceError, match="ld"):
        run(exchange.format(barrier="") + STORE)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("mov.b32 %r3, 1; st.global.b32 [%rd1+4], %r3; ret;", MemoryAccessError),  # the last thread's
        ("mov.b32 %r3, 1; st.global.b32 [%rd1+-4], %r3; ret;", MemoryAccessError),
        ("mov.b32 %r3, 1; st.global.b32 [%rd1+2], %r3; ret;", MemoryAccessError),  # not aligned
        ("mov.b32 %r3, 1; st.shared.b32 [global_smem+256], %r3; ret;", MemoryAccessError),
        ("ld.shared.b32 %r3, [global_smem]; ret;", UninitialisedError),
        ("add.s32 %r3, %r9, 1; ret;", UninitialisedError),
        ("st.global.b32 [%rd0], %r0; ret;", RaceError),  # all threads, one place
        ("setp.lt.s32 %p1, %r0, 40; @%p1 bar.sync 0; ret;", BarrierError),
        ("setp.lt.s32 %p1, %r0, 40; @%p1 bra $L_out; bar.sync 0;\n$L_out:\nret;", BarrierError),
        ("setp.lt.s32 %p1, %r0, 40; @%p1 shfl.sync.bfly.b32 %r3, %r0, 1, 31, -1; ret;", BarrierError),
        ("add.rz.f32 %r3, %r0, %r0; ret;", UnknownInstructionError),  # a rounding that is not there
        ("atom.global.add.u32 %r3, [%rd0], 1; ret;", UnknownInstructionError),
        ("mov.b32 %r3, %r0;", EmulationError),  # runs on
    ],
)
def test_what_must_not_be_is_an_error(body: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        run(body)


def test_two_programs_may_read_and_not_write_the_same_place() -> None:
    first = "setp.eq.s32 %p1, %r0, 0; {guard} st.global.b32 [%rd0], %r1; ret;"
    with pytest.raises(RaceError, match="programs 0 and 1"):
        run(first.format(guard="@%p1"), programs=2)
    assert run("ld.global.b32 %r3, [%rd0]; ret;", programs=2).tolist() == [[-1] * THREADS] * 2


def test_threads_of_a_warp_may_store_one_value_in_shared_memory_and_not_two() -> None:
    warp = (
        "shr.u32 %r4, %r0, 5; shl.b32 %r5, %r4, 2; st.shared.b32 [%r5], {value}; bar.sync 0; ld.shared.b32 %r3, [%r5];"
        + STORE
    )
    assert run(warp.format(value="%r4"))[0].tolist() == [0] * 32 + [1] * 32
    with pytest.raises(RaceError):
        run(warp.format(value="%r0"))


def test_no_two_threads_store_at_one_place_in_global_memory() -> None:
    with pytest.raises(RaceError):
        run("shr.u32 %r4, %r0, 5; mad.wide.s32 %rd2, %r4, 4, %rd0; st.global.b32 [%rd2], %r4; ret;")


# --- numbers


def test_a_fused_product_is_rounded_once() -> None:
    # 1 + 2^-24 + 2^-60 is above half of an ulp
    a, b = np.float32(1774001 * 2.0**-30), np.float32(38737 * 2.0**-30)
    assert 1774001 * 38737 == 2**36 + 1
    assert fused(np.array([a]), np.array([b]), np.array([np.float32(1)]))[0] == np.float32(1 + 2.0**-23)
    assert np.float32(np.float64(a) * b + 1.0) == 1.0  # rounded twice
    assert fused(np.array([-a]), np.array([b]), np.array([np.float32(-1)]))[0] == np.float32(-1 - 2.0**-23)
    with np.errstate(invalid="ignore"):
        special = fused(*(np.array(x, np.float32) for x in ([np.inf, 0, 1], [1, np.inf, 1], [-np.inf, 1, np.inf])))
    assert np.isnan(special[:2]).all()
    assert special[2] == np.inf


def test_bits_are_taken_out_of_a_number() -> None:
    # bits 4 to 6 of the thread's number, and all from bit 5 on
    out = run("bfe.u32 %r4, %r0, 4, 3; bfe.s32 %r5, %r0, 4, 2; mad.lo.s32 %r3, %r5, 100, %r4;" + STORE)
    signed = {0: 0, 1: 1, 2: -2, 3: -1}
    assert out[0].tolist() == [100 * signed[t >> 4 & 3] + (t >> 4 & 7) for t in range(THREADS)]


def test_bytes_of_two_numbers_are_chosen() -> None:
    # 0x..a5 and 0x04030201: a byte of either, the sign of the first one's, and one of the second's
    out = run("mov.b32 %r4, 0xa5; mov.b32 %r5, 0x04030201; prmt.b32 %r3, %r4, %r5, 0x7805U;" + STORE)
    assert np.unique(out[0].view(np.uint32)).tolist() == [0x04FFA502]


def test_a_warp_adds_up() -> None:
    out = run("mov.b32 %r4, -1; redux.sync.add.s32 %r3, %r0, %r4;" + STORE)
    assert out[0].tolist() == [sum(range(32))] * 32 + [sum(range(32, 64))] * 32
    with pytest.raises(UnknownInstructionError):
        run("mov.b32 %r4, 1; redux.sync.add.s32 %r3, %r0, %r4;" + STORE)


def test_bf16_is_rounded_to_even() -> None:
    x = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-7, np.inf, 3.4e38], np.float32)
    want = np.array([1, 1 + 2.0**-6, -1 - 2.0**-7, np.inf, np.inf], np.float32)
    assert decode(to_bf16(x), "bf16").tolist() == want.tolist()
    assert np.isnan(decode(encode(np.array([np.nan], np.float32), "bf16"), "bf16")).all()


def test_noise_is_bounded_seeded_and_the_same_for_the_same_input() -> None:
    x = np.linspace(1, 2, 10_001).astype(np.float32)
    exact = np.exp2(x.astype(np.float64))
    first, again, other = (Noise(seed).relative(exact, 2.0**-22, x) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).mean() > 0.3
    error = np.abs(first / exact - 1)
    # the bound, and the rounding to float32
    assert 2.0**-22.5 < error.max() <= 2.0**-22 + 2.0**-24
    assert (Noise(0).relative(exact, 2.0**-22, x) == exact.astype(np.float32)).all()


def test_special_values_have_no_noise() -> None:
    for name, at_zero in (("ex2", 1.0), ("sqrt", 0.0)):
        assert operation((name, "approx", "f32"), Noise(1)).compute(np.zeros(1, np.float32)) == at_zero
