"""A process reward model: it reads a response with a separator behind each step, and says there how likely the step is
right. The first step below a threshold is the first wrong one.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, NamedTuple

import torch

from prefixloss.detect.base import BatchDetector, FirstError
from prefixloss.detect.cost import spend

_STEPS = "\ue000steps\ue000"  # stands for the response in a rendered chat template
_LOADING = threading.Lock()


@dataclass(frozen=True)
class PRM(BatchDetector):
    """A token classifier of `transformers` in the form of Qwen2.5-Math-PRM. A step's reward is the probability of the
    positive label at the separator behind it; confidence is 1 - reward for an error, else the lowest reward.

    Responses are batched, so `seconds` does not limit them: what bounds the work is the number of tokens. How a batch
    is padded may change a reward by the rounding of its dtype.

    model: a local directory, or the name of a model to fetch from the hub. Loaded at the first use, once a process;
    `load` does so early, and raises where the settings do not fit.
    separator: one token of the tokenizer. In a problem or a step it is read as a space, like every special token.
    threshold: a reward strictly below it is an error.
    system: the system prompt; None leaves it to the chat template. A tokenizer without a chat template reads the
    problem, a line break and the steps.
    max_tokens: a longer input is not read at all; None stands for the model's own limit, which always holds.
    device: "auto" is the accelerator if there is one, else the CPU. dtype: "auto" is the checkpoint's.
    trust_remote_code: whether the code that comes with a model may be run.
    """

    model: str
    separator: str = "<extra_0>"
    threshold: float = 0.8
    positive_label: int = 1
    system: str | None = None
    batch_size: int = 8
    max_tokens: int | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    trust_remote_code: bool = False
    seconds: float = field(default=math.inf, kw_only=True)

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model: got '', expected a directory or the name of a model")
        if not self.separator:
            raise ValueError("separator: got '', expected one token")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold: got {self.threshold}, expected 0 < threshold <= 1")
        if self.positive_label < 0:
            raise ValueError(f"positive_label: got {self.positive_label}, expected a label's index")
        if self.batch_size < 1:
            raise ValueError(f"batch_size: got {self.batch_size}, expected at least 1")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens: got {self.max_tokens}, expected at least 1")

    def load(self) -> None:
        """Loads the model and checks the settings against it. ValueError names the setting that does not fit."""
        self._loaded()

    def find(self, problem: str, steps: Sequence[str], answer: str | None) -> FirstError:
        self.load()
        return super().find(problem, steps, answer)

    def detect_batch(
        self,
        problems: Sequence[str],
        steps: Sequence[Sequence[str]],
        answers: Sequence[str | None] | None = None,
    ) -> list[FirstError]:
        """One result a response, in order. There is no time limit a response; the right answers are not used."""
        try:
            loaded = self._loaded()
        except Exception as error:
            return [_failed(error)] * len(problems)
        results: dict[int, FirstError] = {}
        inputs: dict[int, _Input] = {}
        for i, (problem, response) in enumerate(zip(problems, steps, strict=True)):
            read = self._read(loaded, problem, response)
            if isinstance(read, FirstError):
                results[i] = read
            else:
                inputs[i] = read
        by_length = sorted(inputs, key=lambda i: len(inputs[i].ids))
        for start in range(0, len(by_length), self.batch_size):
            batch = by_length[start : start + self.batch_size]
            results.update(zip(batch, self._judge(loaded, [inputs[i] for i in batch]), strict=True))
        return [results[i] for i in range(len(results))]

    def _loaded(self) -> _Loaded:
        with _LOADING:  # threads that start together load once
            loaded = _load(self.model, self.device, self.dtype, self.trust_remote_code)
        if len(loaded.known(self.separator)) != 1:
            raise ValueError(f"separator: got {self.separator!r}, expected one token of the tokenizer of {self.model}")
        if self.positive_label >= loaded.labels:
            raise ValueError(f"positive_label: got {self.positive_label}, the model has {loaded.labels} labels")
        return loaded

    def _read(self, loaded: _Loaded, problem: str, steps: Sequence[str]) -> _Input | FirstError:
        """A response as tokens, or why it cannot be read."""
        if not steps:
            return FirstError(None, "no steps", 0.0)
        try:
            read = loaded.read(problem, steps, self.separator, self.system)
        except Exception as error:  # a batch goes on without this response
            return _failed(error)
        most = min(self.max_tokens or loaded.most_tokens, loaded.most_tokens)
        if len(read.ids) > most:
            return FirstError(None, f"{len(read.ids)} tokens, the model takes {most}", 0.0)
        return read

    def _judge(self, loaded: _Loaded, batch: Sequence[_Input]) -> list[FirstError]:
        """A batch that fails is tried again one by one, so that only the responses at fault are lost."""
        try:
            rewards = loaded.rewards(batch, self.positive_label)
        except Exception as error:
            if len(batch) == 1:
                return [_failed(error)]
        else:
            return [self._first_error(r) for r in rewards]
        return [self._judge(loaded, [one])[0] for one in batch]

    def _first_error(self, rewards: Sequence[float]) -> FirstError:
        if not all(map(math.isfinite, rewards)):
            return FirstError(None, "failed: the rewards are not finite", 0.0)
        for step, reward in enumerate(rewards):
            if reward < self.threshold:
                return FirstError(step, f"reward {reward:.4g} is below {self.threshold:g}", 1 - reward)
        return FirstError(None, f"every reward is at least {min(rewards):.4g}", min(rewards))


class _Input(NamedTuple):
    """ids: a response's tokens. ends: where among them each step's separator is."""

    ids: list[int]
    ends: list[int]


class _Loaded(NamedTuple):
    """A model with its tokenizer. most_tokens: how long an input may be."""

    model: Any
    tokenizer: Any
    labels: int
    most_tokens: int

    def known(self, text: str) -> list[int]:
        """A text's tokens, without those that only stand for what the tokenizer does not know."""
        return [token for token in self._tokens(text) if token != self.tokenizer.unk_token_id]

    def read(self, problem: str, steps: Sequence[str], separator: str, system: str | None) -> _Input:
        """Each step is tokenized by itself, up to its separator: nothing that it says can move a boundary."""
        marks = {separator, *self.tokenizer.all_special_tokens, _STEPS}
        special = re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True))))
        plain = [special.sub(" ", step) for step in steps]
        [end] = self.known(separator)
        ids, tail, head = self._frame(special.sub(" ", problem), system)
        ends = []
        for step in [head + plain[0], *plain[1:]]:
            ids += [*self._tokens(step), end]
            ends.append(len(ids) - 1)
        return _Input(ids + tail, ends)

    def _frame(self, problem: str, system: str | None) -> tuple[list[int], list[int], str]:
        """The tokens before and after a response, and the text that leads up to it."""
        if self.tokenizer.chat_template is not None:
            chat = [{"role": "system", "content": system}] if system is not None else []
            chat += [{"role": "user", "content": problem}, {"role": "assistant", "content": _STEPS}]
            head, _, tail = self.tokenizer.apply_chat_template(chat, tokenize=False).rpartition(_STEPS)
            return [], self._tokens(tail), head
        head = "\n".join([*([] if system is None else [system]), problem, ""])
        inner, framed = self._tokens("a"), list(self.tokenizer("a")["input_ids"])
        before = next(i for i in range(len(framed)) if framed[i : i + len(inner)] == inner)
        return framed[:before], framed[before + len(inner) :], head

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    @torch.inference_mode()
    def rewards(self, batch: Sequence[_Input], label: int) -> list[list[float]]:
        """A probability for each step of each input. Padded on the right, so that positions count from the start."""
        longest = max(len(one.ids) for one in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, one in enumerate(batch):
            ids[row, : len(one.ids)] = torch.tensor(one.ids)
            mask[row, : len(one.ids)] = 1
        device = self.model.device
        logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device))[0]
        spend(len(batch), sum(len(one.ids) for one in batch))
        at_ends = [logits[row, one.ends].cpu().double() for row, one in enumerate(batch)]
        return [scores.softmax(-1)[:, label].tolist() for scores in at_ends]


@cache
def _load(name: str, device: str, dtype: str, trust_remote_code: bool) -> _Loaded:
    from transformers import AutoConfig, AutoTokenizer  # noqa: PLC0415

    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    kind = _model_class(config, trust_remote_code)
    options = {"trust_remote_code": True} if trust_remote_code else {}
    model, report = kind.from_pretrained(name, config=config, dtype=dtype, output_loading_info=True, **options)
    if report["missing_keys"]:  # a head made up at random would still give rewards
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise ValueError(f"model: {name} is no token classifier: it has no {missing}")
    limits = list(_limits(config.get_text_config(), tokenizer))
    return _Loaded(model.to(_device(device)).eval(), tokenizer, config.num_labels, min(limits))


def _limits(config: Any, tokenizer: Any) -> Iterator[int]:
    """How many tokens the tokenizer and the model take: a tokenizer without a limit names a huge one."""
    yield int(tokenizer.model_max_length)
    if getattr(config, "max_position_embeddings", None):
        yield int(config.max_position_embeddings)


def _device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _model_class(config: Any, trust_remote_code: bool) -> Any:
    from transformers import AutoModel, AutoModelForTokenClassification  # noqa: PLC0415

    if "Qwen2ForProcessRewardModel" in (config.architectures or []):
        return _qwen_class()
    foreign = getattr(config, "auto_map", None) or {}
    if trust_remote_code and "AutoModel" in foreign and "AutoModelForTokenClassification" not in foreign:
        return AutoModel
    return AutoModelForTokenClassification


def _qwen_class() -> Any:
    """Qwen2.5-Math-PRM, which `transformers` knows by foreign code only: a head of two layers."""
    from transformers import Qwen2ForTokenClassification  # noqa: PLC0415

    class Qwen2ForProcessRewardModel(Qwen2ForTokenClassification):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            size = config.hidden_size
            self.score = torch.nn.Sequential(
                torch.nn.Linear(size, size), torch.nn.ReLU(), torch.nn.Linear(size, config.num_labels)
            )

    return Qwen2ForProcessRewardModel


def _failed(error: Exception) -> FirstError:
    return FirstError(None, f"failed: {type(error).__name__}: {error}"[:200], 0.0)
