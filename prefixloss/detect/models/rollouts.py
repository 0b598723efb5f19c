"""Judges that need no labels: a model goes on from the prefixes of a wrong response, and its answers are checked."""

from __future__ import annotations

import asyncio
import math
import threading
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from prefixloss import check
from prefixloss.detect.base import BatchDetector, FirstError
from prefixloss.detect.cost import spend
from prefixloss.detect.maths.answers import states
from prefixloss.detect.models.batches import failed
from prefixloss.detect.models.loading import whole
from prefixloss.detect.models.sampling import Sampler
from prefixloss.detect.models.search import Ask, Counts, Prefix, prefix_of, search
from prefixloss.io.endpoint import Endpoint, check_server, opened, run, tokens_used, why_not
from prefixloss.steps import INSTRUCTION

_LOADING = threading.Lock()
_MOST_KEPT = 100_000  # counts of prefixes
_MOST_BYTES = 64 << 20  # of a reply

Right = Callable[[Prefix, str], bool]  # whether a continuation ends with the right answer


@dataclass(frozen=True)
class _Continuing(BatchDetector):
    """Needs the right answers: only a response whose own answer is another one is searched (see `search`). Counts are
    kept, so that a prefix which was asked about once costs nothing; responses to one problem share its beginning.

    samples: continuations from each prefix. fall: a prefix has fallen where its share of right answers is below this
    part of that of the longest one that has not. budget: most continuations a response; with none left the earliest
    step that is still possible is named, with so much less confidence. max_tokens: of a continuation; one that is cut
    off has no right answer. temperature, seed: of the samples, which are the same for the same seed.
    """

    samples: int = field(default=8, kw_only=True)
    fall: float = field(default=0.5, kw_only=True)
    budget: int = field(default=64, kw_only=True)
    max_tokens: int = field(default=512, kw_only=True)
    temperature: float = field(default=1.0, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    seconds: float = field(default=math.inf, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("samples", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if not 0 < self.fall < 1:
            raise ValueError(f"fall: got {self.fall}, expected 0 < fall < 1")
        if self.budget < self.samples:
            raise ValueError(f"budget: got {self.budget}, expected at least samples, {self.samples}")
        check.number("temperature", self.temperature, 1e-3, 100.0)

    def detect_batch(
        self,
        problems: Sequence[str],
        steps: Sequence[Sequence[str]],
        answers: Sequence[str | None] | None = None,
    ) -> list[FirstError]:
        """One result a response, in order. All of them go through each round of the search together."""
        known = answers if answers is not None else [None] * len(problems)
        results: list[FirstError | None] = [
            self._unsearched(response, answer) for response, answer in zip(steps, known, strict=True)
        ]
        open_ = [i for i, result in enumerate(results) if result is None]
        wrong = [(problems[i], steps[i], str(known[i])) for i in open_]
        try:
            found = search(wrong, self._ask(), fall=self.fall, rounds=self.budget // self.samples) if wrong else []
        except Exception as error:
            found = [failed(error)] * len(wrong)
        for i, result in zip(open_, found, strict=True):
            results[i] = result
        return [result for result in results if result is not None]

    def _unsearched(self, steps: Sequence[str], answer: str | None) -> FirstError | None:
        """Why nothing is to be found by continuations."""
        if not steps:
            return FirstError(None, "no steps", 0.0)
        if answer is None:
            return FirstError(None, "no right answer is known", 0.0)
        if states(prefix_of(steps, len(steps)), answer):
            return FirstError(None, "the answer is right: nothing to search", 0.0)
        return None

    @abstractmethod
    def _ask(self) -> Ask:
        """Counts for prefixes; may raise where there can be none at all."""


def says(prefix: Prefix, continuation: str) -> bool:
    """Whether prefix and continuation together end with the right answer."""
    return states(prefix.text + continuation, prefix.answer)


def counted(sampler: Sampler, samples: int, right: Right = says) -> Ask:
    """By a model in this process."""

    def ask(prefixes: Sequence[Prefix]) -> list[Counts | str]:
        texts = sampler.continuations([(p.problem, p.text) for p in prefixes], samples)
        return [
            Counts(sum(text is not None and right(prefix, text) for text in some), samples)
            for prefix, some in zip(prefixes, texts, strict=True)
        ]

    return ask


def kept(ask: Ask, known: dict[Any, Counts], settings: object) -> Ask:
    """Asks once for each prefix. known: what was found, of all settings."""

    def asked(prefixes: Sequence[Prefix]) -> list[Counts | str]:
        new = [prefix for prefix in prefixes if (settings, prefix) not in known]
        found = dict(zip(new, ask(new) if new else [], strict=True))
        for prefix, counts in found.items():
            if isinstance(counts, Counts) and len(known) < _MOST_KEPT:
                known[settings, prefix] = counts
        return [found[prefix] if prefix in found else known[settings, prefix] for prefix in prefixes]

    return asked


_KNOWN: dict[Any, Counts] = {}


@dataclass(frozen=True)
class Rollouts(_Continuing):
    """By a causal LM of `transformers` in this process, which is asked for numbered steps and a boxed answer.

    model: a local directory, or the name of a model to fetch from the hub; loaded once a process. A policy that
    `prefixloss train` saved is asked as it was trained. batch_size: continuations at once. device, dtype: as in `PRM`.
    """

    model: str
    batch_size: int = 64
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            raise ValueError("model: got '', expected a directory or the name of a model")
        if self.batch_size < 1:
            raise ValueError(f"batch_size: got {self.batch_size}, expected at least 1")

    def load(self) -> None:
        """Loads the model, and raises where it cannot work."""
        with _LOADING:  # threads that start together load once
            _load(self.model, self.device, self.dtype, self.trust_remote_code)

    def _ask(self) -> Ask:
        self.load()
        model, tokenizer = _load(self.model, self.device, self.dtype, self.trust_remote_code)
        instruction = getattr(model.config, "prefixloss_instruction", None) or INSTRUCTION
        sampler = sampler_of(
            model, tokenizer, instruction, self.max_tokens, self.temperature, self.batch_size, self.seed
        )
        # how a batch is made up changes nothing but rounding
        settings = (self.model, self.dtype, self.samples, self.max_tokens, self.temperature, self.seed)
        return kept(counted(sampler, self.samples), _KNOWN, settings)


@dataclass(frozen=True)
class OwnRollouts(_Continuing):
    """By a model that is being trained, or any other that is at hand: nothing is kept from one call to the next.

    sampler: it decides on max_tokens, temperature and seed.
    """

    sampler: Sampler

    def _ask(self) -> Ask:
        return counted(self.sampler, self.samples)


def sampler_of(
    model: Any, tokenizer: Any, instruction: str, max_tokens: int, temperature: float, batch_size: int, seed: int
) -> Sampler:
    """instruction: a text with {question} in it; a chat template goes around it."""

    def prompt(question: str) -> str:
        text = instruction.format(question=question)
        if getattr(tokenizer, "chat_template", None) is None:
            return text
        chat = [{"role": "user", "content": text}]
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))

    special = getattr(tokenizer, "chat_template", None) is None  # else the template has written them
    return Sampler(model, tokenizer, prompt, special, max_tokens, temperature, batch_size, seed)


@cache
def _load(name: str, device: str, dtype: str, trust_remote_code: bool) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    return whole(AutoModelForCausalLM, name, "causal language model", device, dtype, trust_remote_code), tokenizer


@dataclass(frozen=True)
class ServedRollouts(_Continuing):
    """By a model behind an OpenAI-compatible endpoint that continues a message that has begun, as vLLM and SGLang do
    (`continue_final_message`).

    url: the endpoint's base, such as "http://localhost:8000/v1". model: its name there. concurrency: requests at a
    time, each for all continuations of a prefix. seconds: the limit a request, over all tries. tries: how often to ask
    while the endpoint is busy (429), fails (5xx), is silent or hangs up.
    """

    url: str
    model: str
    tries: int = 3
    concurrency: int = 16
    api_key_env: str = "OPENAI_API_KEY"
    seconds: float = field(default=300.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_server(self, "tries", "concurrency")
        if not self.model:
            raise ValueError("model: got '', expected a name")

    def _ask(self) -> Ask:
        def ask(prefixes: Sequence[Prefix]) -> list[Counts | str]:
            try:
                return run(self._ask_all(prefixes))
            except Exception as error:
                return [why_not(error)] * len(prefixes)

        settings = (self.url, self.model, self.samples, self.max_tokens, self.temperature, self.seed)
        return kept(ask, _KNOWN, settings)

    async def _ask_all(self, prefixes: Sequence[Prefix]) -> list[Counts | str]:
        gate = asyncio.Semaphore(self.concurrency)
        async with opened(self.url.rstrip("/"), self.api_key_env, _MOST_BYTES) as endpoint:
            return await asyncio.gather(*(self._one(endpoint, gate, prefix) for prefix in prefixes))

    async def _one(self, endpoint: Endpoint, gate: asyncio.Semaphore, prefix: Prefix) -> Counts | str:
        messages = [{"role": "user", "content": INSTRUCTION.format(question=prefix.problem)}]
        goes_on = {"add_generation_prompt": False, "continue_final_message": True} if prefix.text else {}
        if prefix.text:
            messages.append({"role": "assistant", "content": prefix.text})
        request = {
            "model": self.model, "messages": messages, "n": self.samples, "max_tokens": self.max_tokens,
            "temperature": self.temperature, "seed": self.seed, **goes_on,
        }  # fmt: skip
        async with gate:
            try:
                reply = await endpoint.ask("/chat/completions", request, self.seconds, self.tries)
                texts = [
                    None if choice.get("finish_reason") == "length" else str(choice["message"]["content"] or "")
                    for choice in reply["choices"]
                ]
                if len(texts) != self.samples:
                    return f"unreadable continuations: {len(texts)} of {self.samples}"
            except (LookupError, TypeError, AttributeError):
                return f"unreadable continuations: {str(reply)[:200]}"
            except Exception as error:
                return endpoint.reason(error)
        spend(self.samples, tokens_used(reply))
        return Counts(sum(text is not None and says(prefix, text) for text in texts), self.samples)
