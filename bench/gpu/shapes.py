"""All that is measured on."""

from __future__ import annotations

from typing import NamedTuple

GIB = 2**30
# draws of random data whose errors are taken together: one loss alone can be right by luck
DRAWS = 8


class Shapes(NamedTuple):
    """All that is measured on."""

    vocabulary: int
    width: int
    tokens: int  # from hidden states
    tokens_for_memory: int  # the same without rivals
    tokens_for_logps: int
    responses: int
    length: int  # logits [responses, length, vocabulary]
    few_rows: int
    many_rows: int  # more than 2^31 logits
    long_response: int
    long_width: int
    exact: tuple[int, int, int]  # tokens, width and vocabulary beside float64
    chunks: tuple[int, ...]
    rounds: int


FULL = Shapes(
    vocabulary=151_936,
    width=4096,
    tokens=32_768,
    tokens_for_memory=131_072,
    tokens_for_logps=8192,
    responses=8,
    length=1024,
    few_rows=16,
    many_rows=16_384,
    long_response=1_000_000,
    long_width=1024,
    exact=(256, 512, 32_000),
    chunks=(1024, 1664, 2048, 4096, 8192),
    rounds=20,
)
SMALL = Shapes(
    vocabulary=1000,
    width=64,
    tokens=256,
    tokens_for_memory=512,
    tokens_for_logps=64,
    responses=4,
    length=8,
    few_rows=2,
    many_rows=16,
    long_response=1000,
    long_width=32,
    exact=(32, 32, 500),
    chunks=(64, 128),
    rounds=2,
)
