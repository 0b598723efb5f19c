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

from prefixloss.detect.cost import spend
from prefixloss.detect.models.batches import Judging, ModelDetector, check_marks, first_below
from prefixloss.detect.models.loading import whole
from prefixloss.detect.models.reading import Marked, Reader, most_tokens, padded

_LOADING = threading.Lock()


@dataclass(frozen=True)
class PRM(ModelDetector):
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
        super().__post_init__()
        check_marks(self.separator, self.threshold, self.positive_label)

    def _judging(self) -> Judging:
        with _LOADING:  # threads that start together load once
            loaded = _load(self.model, self.device, self.dtype, self.trust_remote_code)
        if len(loaded.reader.known(self.separator)) != 1:
            raise ValueError(f"separator: got {self.separator!r}, expected one token of the tokenizer of {self.model}")
        if self.positive_label >= loaded.labels:
            raise ValueError(f"positive_label: got {self.positive_label}, the model has {loaded.labels} labels")
        return Judging(
            partial(loaded.read, separator=self.separator, system=self.system),
            loaded.most_tokens,
            partial(loaded.rewards, label=self.positive_label),
            partial(first_below, threshold=loaded.threshold if self.threshold is None else self.threshold),
        )


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
    model = whole(kind, name, "token classifier", device, dtype, trust_remote_code, config=config)
    return _Loaded(model, tokenizer, config.num_labels, most_tokens(config, tokenizer))


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
