"""A process reward model: it reads a response with a separator behind each step, and says there how likely the step is
right. The first step below a threshold is the first wrong one.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import torch

from prefixloss.detect.base import BatchDetector, FirstError
from prefixloss.detect.cost import spend
from prefixloss.detect.models.batches import failed, first_below, judged, readable
from prefixloss.detect.models.reading import Marked, Reader, device_of, most_tokens, padded

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
    threshold: a reward strictly below it is an error; None stands for the one that the checkpoint was trained to have
        (`prefixloss prm train`), else 0.8.
    system: the system prompt; None leaves it to the chat template. A tokenizer without a chat template reads the
    problem, a line break and the steps.
    max_tokens: a longer input is not read at all; None stands for the model's own limit, which always holds.
    device: "auto" is the accelerator if there is one, else the CPU. dtype: "auto" is the checkpoint's.
    trust_remote_code: whether the code that comes with a model may be run.
    """

    model: str
    separator: str = "<extra_0>"
    threshold: float | None = None
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
        if self.threshold is not None and not 0 < self.threshold <= 1:
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
            return [failed(error)] * len(problems)
        most = min(self.max_tokens or loaded.most_tokens, loaded.most_tokens)
        inputs = [
            readable(response, partial(loaded.read, problem, response, self.separator, self.system), most)
            for problem, response in zip(problems, steps, strict=True)
        ]
        threshold = loaded.threshold if self.threshold is None else self.threshold
        rewards = partial(loaded.rewards, label=self.positive_label)
        return judged(inputs, self.batch_size, rewards, partial(first_below, threshold=threshold))

    def _loaded(self) -> _Loaded:
        with _LOADING:  # threads that start together load once
            loaded = _load(self.model, self.device, self.dtype, self.trust_remote_code)
        if len(loaded.reader.known(self.separator)) != 1:
            raise ValueError(f"separator: got {self.separator!r}, expected one token of the tokenizer of {self.model}")
        if self.positive_label >= loaded.labels:
            raise ValueError(f"positive_label: got {self.positive_label}, the model has {loaded.labels} labels")
        return loaded


class _Loaded(NamedTuple):
    """A model with its tokenizer. most_tokens: how long an input may be."""

    model: Any
    tokenizer: Any
    labels: int
    most_tokens: int

    @property
    def threshold(self) -> float:
        return float(getattr(self.model.config, "prefixloss_threshold", None) or 0.8)

    @property
    def reader(self) -> Reader:
        return Reader(self.tokenizer)

    def read(self, problem: str, steps: Sequence[str], separator: str, system: str | None) -> Marked:
        return self.reader.read(problem, steps, self.reader.known(separator), 0, separator, system)

    @torch.inference_mode()
    def rewards(self, batch: Sequence[Marked], label: int) -> list[list[float]]:
        """A probability for each step of each input."""
        ids, mask = padded([one.ids for one in batch], self.model.device)
        logits = self.model(input_ids=ids, attention_mask=mask)[0]
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
    return _Loaded(model.to(device_of(device)).eval(), tokenizer, config.num_labels, most_tokens(config, tokenizer))


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
