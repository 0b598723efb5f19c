"""Rows a chunk by waves: against a search of all there are, in bytes and operations."""

import math

import pytest
import torch

from prefixloss.backends.problem import Head
from prefixloss.backends.triton import waves
from prefixloss.backends.triton.chunks import HeadChunks, Wanted

V = 151_936
CPU = torch.device("cpu")
ROW = 4 * V  # bytes


def seconds(rows: int, size: int, width: int, processors: int) -> float:
    """Of all chunks on a card of 790 TFLOP/s at 132 multiprocessors and 263 operations a byte."""
    speed = 790e12 / 132
    tiles = math.ceil(size / 128) * math.ceil(width / 256)
    hidden = math.ceil(tiles / processors) * 2 * 128 * 256 * V / speed
    others = 2 * 2 * size * V * width / (speed * processors)
    the_sum = 2 * 4 * V * width / (speed * processors / 263)
    return math.ceil(rows / size) * (hidden + others + the_sum)


@pytest.mark.parametrize("processors", [132, 108, 78, 304, 1])
@pytest.mark.parametrize("width", [1, 1024, 2560, 4096, 8192])
def test_no_other_number_of_rows_costs_less(processors: int, width: int) -> None:
    for rows in (1, 17, 128, 129, 1000, 1639, 5000, 12_345, 20_000, 32_768):
        for most in (128, 640, 1664, 4096, 8192):
            size = waves.cheapest(rows, most, waves.Products(width, processors))
            assert 1 <= size <= most
            assert size % (128 if size > 128 else 16) == 0
            assert (math.ceil(rows / size) - 1) * size < rows  # no chunk is padding alone
            others = [*range(16, 128, 16), *range(128, most + 1, 128)]
            best = min(seconds(rows, other, width, processors) for other in others)
            assert seconds(rows, size, width, processors) <= best * (1 + 1e-9)


def test_a_few_rows_are_one_chunk() -> None:
    for rows in range(1, 700, 3):
        size = waves.cheapest(rows, 1024, waves.Products(4096, 132))
        assert rows <= size < rows + 128


def test_without_a_budget_a_chunk_has_4096_rows_as_far_as_a_32nd_of_the_card_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def rows(gib: int, bytes_per_row: int = ROW) -> int:
        monkeypatch.setattr(waves, "_memory", lambda device: gib * 2**30)
        return waves.chunk_rows(32_768, 32_768, bytes_per_row, 4096, torch.device("cuda"), None)

    monkeypatch.setattr(waves, "processors", lambda device: 132)
    monkeypatch.delenv("PREFIXLOSS_MEMORY", raising=False)
    assert rows(80) == rows(192) == 4096
    assert rows(64) == 3072  # of the 3,533 that two GiB hold: 2.9 of 3 waves in 11 chunks, where 10 take 4 waves each
    assert rows(16) == rows(0) == 1664  # a GiB
    assert rows(80, ROW // 8) == 8192  # a GiB holds more
    monkeypatch.setenv("PREFIXLOSS_MEMORY", str(2**30))  # a budget that somebody set is kept
    assert rows(80) == 1664
    assert waves.chunk_rows(100, 100, ROW, 4096, CPU, 7) == 7
    assert waves.chunk_rows(0, 100, ROW, 4096, CPU, 7) == waves.chunk_rows(0, 100, ROW, 4096, CPU, None) == 0


def test_a_card_is_asked_once_for_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Properties:
        total_memory = 5

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: asked.append(device) or Properties)
    waves._memory.cache_clear()
    assert [waves._memory(torch.device("cuda", 1)) for _ in range(2)] == [5, 5]
    assert asked == [torch.device("cuda", 1)]
    waves._memory.cache_clear()
    assert waves._memory(CPU) == 0


def test_chunks_are_cut_by_waves(monkeypatch: pytest.MonkeyPatch) -> None:
    """640 rows in two chunks of 384 fill one wave and a half each; three of 256 fill theirs."""
    monkeypatch.setattr(waves, "processors", lambda device: 2)
    monkeypatch.setenv("PREFIXLOSS_MEMORY", str(64 * 640 + 384 * 4 * 20))
    head = Head(torch.zeros(640, 32), torch.zeros(20, 32), None)
    chunks = HeadChunks(head, None, Wanted(torch.arange(640), None), None)
    assert (chunks.step, chunks.size) == (256, 256)
    assert [len(chunk.rows) for chunk in chunks] == [256, 256, 128]
