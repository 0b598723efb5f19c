"""A process reward model behind a server: vLLM's pooling of every token, in the form of Qwen2.5-Math-PRM."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

from prefixloss.detect.base import BatchDetector, FirstError
from prefixloss.detect.cost import spend
from prefixloss.detect.models.batches import by_length, check_marks, failed, first_below, readable
from prefixloss.detect.models.reading import Marked, Reader
from prefixloss.io.endpoint import (
    Endpoint,
    SilentError,
    UnansweredError,
    check_server,
    opened,
    run,
    tokens_used,
    why_not,
)

_MOST_BYTES = 64 << 20  # of a reply: two numbers a token
_ROUNDING = 0.01  # by which a server's probabilities may miss 1


@dataclass(frozen=True)
class ServedPRM(BatchDetector):
    """What `PRM` is in this process, from `vllm serve MODEL`: POST /pooling with task "token_classify". A server that
    answers for steps alone (vLLM does for Qwen2.5-Math-PRM) and one that answers for every token will both do; rows
    that are no probabilities are taken for logits.

    url: the server's root, such as "http://localhost:8000". model: its name there; "" asks the server.
    tokenizer: a directory or name on the hub; "" is where the server says that the model comes from.
    separator, threshold, positive_label, system, max_tokens: as in `PRM`; None of max_tokens leaves it to the server.
    batch_size: responses a request. concurrency: requests at a time. seconds: the limit a request, over all tries.
    tries: how often to ask while the server is busy (429), fails (5xx), is silent or hangs up.
    """

    url: str
    model: str = ""
    tokenizer: str = ""
    separator: str = "<extra_0>"
    threshold: float = 0.8
    positive_label: int = 1
    system: str | None = None
    batch_size: int = 8
    max_tokens: int | None = None
    tries: int = 3
    concurrency: int = 8
    api_key_env: str = "OPENAI_API_KEY"
    trust_remote_code: bool = False
    seconds: float = field(default=180.0, kw_only=True)

    def __post_init__(self) -> None:
        check_server(self, "batch_size", "tries", "concurrency")
        check_marks(self.separator, self.threshold, self.positive_label)

    def detect_batch(
        self,
        problems: Sequence[str],
        steps: Sequence[Sequence[str]],
        answers: Sequence[str | None] | None = None,
    ) -> list[FirstError]:
        """One result a response, in order; the right answers are not used."""
        try:
            return run(self._detect(list(zip(problems, steps, strict=True))))
        except Exception as error:
            return [FirstError(None, why_not(error), 0.0)] * len(problems)

    async def _detect(self, responses: Sequence[tuple[str, Sequence[str]]]) -> list[FirstError]:
        root = self.url.rstrip("/").removesuffix("/v1")
        async with opened(root, self.api_key_env, _MOST_BYTES) as endpoint:
            try:
                model, source = await self._served(endpoint)
                reader = Reader(_tokenizer(self.tokenizer or source, self.trust_remote_code))
                mark = reader.known(self.separator)
                if len(mark) != 1:
                    raise ValueError(f"separator: got {self.separator!r}, expected one token of the tokenizer")
            except UnansweredError as error:
                return [FirstError(None, endpoint.reason(error), 0.0)] * len(responses)
            except Exception as error:  # the tokenizer's
                return [failed(error)] * len(responses)
            most = self.max_tokens or reader.tokenizer.model_max_length
            inputs = [
                readable(response, partial(reader.read, problem, response, mark, 0, self.separator, self.system), most)
                for problem, response in responses
            ]
            return await self._judged(endpoint, model, inputs)

    async def _served(self, endpoint: Endpoint) -> tuple[str, str]:
        """The model's name at the server, and where it comes from."""
        if self.model and self.tokenizer:
            return self.model, self.tokenizer
        reply = await endpoint.ask("/v1/models", None, self.seconds, self.tries)
        try:
            served = {entry["id"]: str(entry.get("root") or entry["id"]) for entry in reply["data"]}
            model = self.model or next(iter(served))
            return model, served[model]
        except (LookupError, TypeError, AttributeError, StopIteration):
            raise UnansweredError(f"no model {self.model or 'at all'} at the server: {reply}") from None

    async def _judged(self, endpoint: Endpoint, model: str, inputs: Sequence[Marked | FirstError]) -> list[FirstError]:
        gate = asyncio.Semaphore(self.concurrency)
        results, batches = by_length(inputs, self.batch_size)

        async def judge(batch: dict[int, Marked]) -> None:
            async with gate:
                found = await self._batch(endpoint, model, list(batch.values()))
            results.update(zip(batch, found, strict=True))

        await asyncio.gather(*map(judge, batches))
        return [results[i] for i in range(len(results))]

    async def _batch(self, endpoint: Endpoint, model: str, batch: Sequence[Marked]) -> list[FirstError]:
        """A batch that is refused is sent again one by one, so that only the responses at fault are lost."""
        request = {"model": model, "task": "token_classify", "input": [one.ids for one in batch]}
        try:
            reply = await endpoint.ask("/pooling", request, self.seconds, self.tries)
            rewards = _rewards(reply, batch, self.positive_label)
        except Exception as error:
            if len(batch) == 1 or isinstance(error, SilentError):
                return [FirstError(None, endpoint.reason(error), 0.0)] * len(batch)
        else:
            spend(len(batch), tokens_used(reply))
            return [first_below(r, self.threshold) for r in rewards]
        return [(await self._batch(endpoint, model, [one]))[0] for one in batch]


def _rewards(reply: Any, batch: Sequence[Marked], label: int) -> list[list[float]]:
    """A probability for each step of each input of a request."""
    try:
        data = {entry["index"]: entry["data"] for entry in reply["data"]}
        return [_of_steps(data[number], one, label) for number, one in enumerate(batch)]
    except (LookupError, TypeError, AttributeError, ValueError):
        raise UnansweredError(f"unreadable rewards: {str(reply)[:200]}") from None


def _of_steps(rows: list[list[float]], one: Marked, label: int) -> list[float]:
    if len(rows) == len(one.ids):
        rows = [rows[end] for end in one.ends]
    if len(rows) != len(one.ends):
        raise ValueError("neither a row a token nor one a step")
    if all(min(row) >= 0 and abs(sum(row) - 1) <= _ROUNDING for row in rows):
        return [row[label] for row in rows]
    return [1 / math.fsum(math.exp(min(other - row[label], 700.0)) for other in row) for row in rows]


@cache
def _tokenizer(name: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer  # noqa: PLC0415

    return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
