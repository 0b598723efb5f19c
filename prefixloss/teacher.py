"""A teacher behind an OpenAI-compatible endpoint: the likeliest ids of each token, with their log-probs."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefixloss import check
from prefixloss.io.endpoint import NOTHING, UnansweredError, check_server, opened, run

__all__ = ["Listed", "ServedTeacher", "UnansweredError"]

_BYTES_AN_ENTRY = 512  # of a reply: an id, its log-prob and what else a server says of it

# a token's ids with their log-probs
Row = list[tuple[int, float]]


class Listed(NamedTuple):
    """Arguments of `linear_distill_loss`: int64 [M], float32 [M] and int64 [N + 1], packed, a row a token asked for."""

    teacher_ids: Tensor
    teacher_logps: Tensor
    teacher_offsets: Tensor


@dataclass(frozen=True)
class ServedTeacher:
    """A model that reads the student's own token ids, served as vLLM does: completions with `prompt_logprobs`.

    url: the endpoint's base, such as "http://localhost:8000/v1". model: its name there. vocabulary: V of the student.
    top: ids to ask for a token, at most what the server allows (vLLM: --max-logprobs). It adds the token itself where
        that is not among them, and may list fewer: all that is not listed is one class to the loss.
    api_key_env: the environment variable with the key; without it none is sent. concurrency: requests at a time.
    seconds: the limit a sequence, over all tries. tries: how often to ask while the endpoint is busy (429), fails
        (5xx), is silent or hangs up.

    The endpoint also makes one token a request, which is thrown away: none is not allowed everywhere.
    """

    url: str
    model: str
    vocabulary: int
    top: int = 20
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 8
    seconds: float = 120.0
    tries: int = 3

    def __post_init__(self) -> None:
        check_server(self, "vocabulary", "top", "concurrency", "tries")
        if not 0 < self.seconds < math.inf:
            check.fail("seconds", check.describe(self.seconds), "a finite number above 0")

    def listed(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> Listed:
        """What the teacher says of the tokens sequences[i][starts[i]:] of every i, each given all before it.

        sequences: token ids, without padding. starts: at least 1, since nothing is before a first token; the rows are
        those of a packed batch of these tokens, in order, on the CPU.

        ValueError: ids or starts that cannot be. UnansweredError: a sequence has no answer that can be read, for which
        nothing stands in; its text says which and why. ImportError: httpx is missing.
        """
        asked = [_whole("sequences", sequence) for sequence in sequences]
        begun = _whole("starts", starts)
        self._check(asked, begun)
        rows = [row for rows in run(self._ask(asked, begun)) for row in rows]
        ids, logps = ([pair[part] for row in rows for pair in row] for part in (0, 1))
        offsets = torch.tensor([0, *map(len, rows)]).cumsum(0)
        return Listed(torch.tensor(ids, dtype=torch.int64), torch.tensor(logps, dtype=torch.float32), offsets)

    def _check(self, sequences: list[list[int]], starts: Sequence[int]) -> None:
        if len(starts) != len(sequences):
            check.fail("starts", f"{len(starts)} for {len(sequences)} sequences", "one a sequence")
        for number, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
            if not 1 <= start <= len(sequence):
                check.fail("starts", f"{start} for sequence {number} of {len(sequence)} tokens", "from 1 to its length")
            wrong = [token for token in sequence if not 0 <= token < self.vocabulary]
            if wrong:
                check.fail("sequences", f"id {wrong[0]} in sequence {number}", f"ids in [0, {self.vocabulary})")

    async def _ask(self, sequences: list[list[int]], starts: list[int]) -> list[list[Row]]:
        gate = asyncio.Semaphore(self.concurrency)
        most_bytes = 65536 + _BYTES_AN_ENTRY * (self.top + 1) * max(map(len, sequences), default=0)

        async with opened(self.url.rstrip("/"), self.api_key_env, most_bytes) as endpoint:

            async def one(number: int) -> list[Row]:
                tokens, start = sequences[number], starts[number]
                if start == len(tokens):
                    return []
                request = {
                    "model": self.model, "prompt": tokens, "max_tokens": 1, "temperature": 0.0,
                    "prompt_logprobs": self.top,
                }  # fmt: skip
                try:
                    async with gate:
                        reply = await endpoint.ask("/completions", request, self.seconds, self.tries)
                    return self._read(reply, len(tokens), start)
                except Exception as error:
                    raise UnansweredError(f"teacher: sequence {number}: {endpoint.reason(error)}") from None

            return await asyncio.gather(*map(one, range(len(sequences))))

    def _read(self, reply: Any, length: int, start: int) -> list[Row]:
        try:
            places = reply["choices"][0]["prompt_logprobs"]
            found = len(places)
        except (LookupError, TypeError):
            raise UnansweredError(
                'no "prompt_logprobs" in the reply: does the server know them, as vLLM does?'
            ) from None
        if found != length:
            raise UnansweredError(f'"prompt_logprobs" of {found} tokens, expected {length}')
        return [self._row(places[at], at) for at in range(start, length)]

    def _row(self, listed: Any, at: int) -> Row:
        """The likeliest first, whatever the order of the answer."""
        try:
            row = [(int(name), float(entry["logprob"])) for name, entry in listed.items()]
        except (AttributeError, LookupError, TypeError, ValueError):
            raise UnansweredError(f"token {at}: got {str(listed)[:60]}, expected ids with a logprob each") from None
        if not row:
            raise UnansweredError(f"token {at}: no ids are listed, expected {self.top}")
        beyond = next((token for token, _ in row if not 0 <= token < self.vocabulary), None)
        if beyond is not None:
            wants = f"ids in [0, {self.vocabulary}), the student's vocabulary"
            raise UnansweredError(f"token {at}: got id {beyond}, expected {wants}")
        if len(dict(row)) != len(row):
            raise UnansweredError(f"token {at}: an id is listed twice")
        if not all(logp <= check.ROUNDED_PROBABILITIES for _, logp in row):
            raise UnansweredError(f"token {at}: got {str(listed)[:60]}, expected log-probs of at most 0")
        total = sum(math.exp(logp) for _, logp in row)
        if total > 1 + check.ROUNDED_PROBABILITIES:
            raise UnansweredError(f"token {at}: probabilities that add up to {total:.6g}, expected no more than 1")
        row = [(token, -math.inf if logp <= NOTHING else min(logp, 0.0)) for token, logp in row]
        return sorted(row, key=lambda pair: (-pair[1], pair[0]))


def _whole(argument: str, values: Sequence[Any]) -> list[int]:
    for value in values:
        if not check.is_whole(value):
            check.fail(argument, check.describe(value), "whole numbers of at least 0")
    return [int(value) for value in values]
