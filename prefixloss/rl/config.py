"""The settings of a run, checked before any work."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from prefixloss import advantages
from prefixloss.check import describe
from prefixloss.detect.choose import by_name
from prefixloss.detect.models.rollouts import Rollouts
from prefixloss.io import settings
from prefixloss.io.address import Address
from prefixloss.maths.divergence import BY_NAME
from prefixloss.rl import UsageError
from prefixloss.rl.reload import BY_NAME as RELOADS
from prefixloss.steps import SEGMENTERS

ADVANTAGES = (*advantages.BY_NAME, "none")
DISTIL_FROM = ("first-error", "wrong", "all")
DTYPES = ("float32", "bfloat16")
TRACKERS = ("tensorboard", "wandb", "trackio")  # by the names of their packages
_COUNTS = (
    *("updates", "prompts", "group", "max_tokens", "epochs", "minibatches", "micro_prompts", "save_every"),
    *("eval_every", "eval_problems", "eval_samples", "k"),
    *("continuations", "teacher_top", "hidden_size", "layers", "warm_batch", "min_steps", "max_steps"),
)
_MOST = 10**9  # of any count: more is a mistake, and none of what counts with it would fail with a clear message
_KINDS: dict[Any, str] = {
    int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null",
}  # fmt: skip


class SettingError(UsageError):
    """A setting that cannot work. text: what it is and should be, without its name."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"--{name.replace('_', '-')}: {text}")
        self.name, self.text = name, text


class SettingTypeError(SettingError):
    """A setting of the wrong type."""


@dataclass(frozen=True)
class Config:
    """What a run does. The defaults are the built-in demo, `GENERAL` suits other models. UsageError if invalid."""

    # the policy and its problems
    model: str | None = None  # a directory or a hub name; None trains the built-in tiny model
    chat: bool | None = None  # the tokenizer's chat template: needed, or left off; None: used where there is one
    data: str | None = None  # JSON lines with question and answer, or their folder; None: chained arithmetic
    lora: int = 0  # rank of the adapters that are trained in place of the weights; 0: the weights themselves
    dtype: str = "float32"  # of the products; weights that are trained stay in float32
    gradient_checkpointing: bool = False  # layers are computed again on the way back, not kept
    device: str = "cpu"
    threads: int = 1  # 0: one a core. One is as fast for the tiny model, and its results do not depend on the machine's
    seed: int = 0
    log_to: str | None = None  # a tracker of figures, beside metrics.jsonl
    timeout: float = 600.0  # seconds to wait for a server's answer and, under torchrun, for the other processes
    # credit
    advantage: str = "vppo"
    detector: str | None = None  # of first wrong steps, see `prefixloss.detect.choose`; None: the built-in check
    continuations: int = 8  # from each prefix, where the detector is "rollouts", the policy itself
    threshold: float = 0.0  # confidence from 0 to 1, below which a detector's find counts as none
    steps: str = "markers"  # how a detector's steps are cut
    alpha: float = 0.5
    # vppo: what a right answer is worth from its own first wrong step on; None searches wrong answers alone
    flawed: float | None = None
    # tokens cut from the end of a good prefix: here a step counts only if it is the right one, so there is no reward
    # for more steps to guard against, and prompts are longer than steps: "prompt" would leave nothing
    shorten: str | int | float = 0
    # a teacher, drawn to beside what the advantages say; advantage "none" leaves it alone
    teacher: str | None = None  # a directory, a hub name, URL or MODEL@URL, with the policy's own tokenizer
    teacher_top: int = 20  # ids that a served one lists for a token; the rest of the vocabulary is one class
    # tokens from the first error on, of a wrong response or, with `flawed`, of any; or those of wrong ones, or of all
    distill_from: str = "first-error"
    distill_coef: float = 1.0
    divergence: str = "reverse"
    # rollouts and optimisation
    rollouts: str | None = None  # URL or MODEL@URL of an engine that samples; None: the policy does
    reload: str = "vllm"  # how that engine is given new weights, see `prefixloss.rl.reload`
    updates: int = 120
    prompts: int = 32  # per update
    group: int = 8  # responses a prompt
    max_tokens: int = 64
    epochs: int = 2  # passes over the responses of an update
    minibatches: int = 2  # optimiser steps a pass
    micro_prompts: int = 32  # prompts whose responses are in one training pass
    lr: float = 8e-4
    lr_warmup: int = 20  # optimiser steps over which it rises; it then falls to a tenth by the end
    clip: float = 0.2
    kl_coef: float = 0.002
    max_grad_norm: float = 1.0
    # of the loss, see `LossConfig`: 0 is exact
    gradient_tolerance: str | float = 0.0
    head_gradient_tolerance: str | float = 0.0
    # evaluation on held-out problems, checkpoints (both every so many updates)
    eval_every: int = 20
    eval_problems: int = 256
    eval_samples: int = 8
    k: int = 4
    save_every: int = 10
    # the built-in model and its supervised start
    hidden_size: int = 64
    layers: int = 2
    warm_steps: int = 1000  # at most
    warm_loss: float = 0.1  # the running mean of the loss at which it ends
    warm_batch: int = 32
    warm_lr: float = 5e-3
    min_steps: int = 5
    max_steps: int = 6

    def __post_init__(self) -> None:
        for name, kinds in _types().items():
            self._check_type(name, kinds)
        self._check_numbers()
        self._check_method()
        self._check_parts()
        self._check_servers()
        self._check_device()

    def _check_numbers(self) -> None:
        """Each on its own."""
        for name in _COUNTS:
            self._expect(name, getattr(self, name) >= 1, "a whole number of at least 1")
        for name in ("seed", "threads", "warm_steps", "lr_warmup", "lora"):
            self._expect(name, getattr(self, name) >= 0, "a whole number of at least 0")
        for name in (*_COUNTS, "threads", "warm_steps", "lr_warmup", "lora", "timeout"):
            self._expect(name, not getattr(self, name) > _MOST, f"at most {_MOST}")
        self._expect("seed", self.seed < 2**63, "below 2**63")
        for name in ("timeout", "lr", "warm_lr", "warm_loss", "max_grad_norm"):
            self._expect(name, 0 < getattr(self, name) < math.inf, "a number above 0")
        for name in ("clip", "kl_coef", "distill_coef"):
            self._expect(name, 0 <= getattr(self, name) < math.inf, "a number of at least 0")
        for name in ("gradient_tolerance", "head_gradient_tolerance"):
            value = getattr(self, name)
            usable = value == "auto" if isinstance(value, str) else 0 <= value < math.inf
            self._expect(name, usable, '"auto" or a number of at least 0')
        self._expect("threshold", 0 <= self.threshold <= 1, "a number from 0 to 1")
        self._expect("alpha", 0 <= self.alpha <= 1, "a number from 0 to 1")
        cut = self.shorten
        cut_is_valid = cut == "prompt" if isinstance(cut, str) else cut >= 0 if isinstance(cut, int) else 0 <= cut < 1
        self._expect("shorten", cut_is_valid, '"prompt", a number of tokens, or a share below 1 such as 0.1')
        self._expect("group", self.group >= 2, "at least 2: responses are compared within their group")
        self._expect("minibatches", self.minibatches <= self.prompts, f"at most --prompts, {self.prompts}")
        self._expect("k", self.k <= self.eval_samples, f"at most --eval-samples, {self.eval_samples}")
        self._expect("min_steps", self.min_steps <= self.max_steps <= 9, "at most max_steps, which is at most 9")
        self._expect("hidden_size", self.hidden_size % 8 == 0, "a multiple of 8")

    def _check_method(self) -> None:
        """What is learned from what."""
        self._expect(
            "advantage", self.advantage in (*ADVANTAGES, *advantages.ALIASES), f"one of {', '.join(ADVANTAGES)}"
        )
        self._expect("distill_from", self.distill_from in DISTIL_FROM, f"one of {', '.join(DISTIL_FROM)}")
        self._expect("divergence", self.divergence in BY_NAME, f"one of {', '.join(BY_NAME)}")
        self._expect("advantage", self.advantage != "none" or self.teacher, "--teacher with it, or nothing is learned")
        self._expect("steps", self.steps in SEGMENTERS, f"one of {', '.join(SEGMENTERS)}")
        if self.detector is not None:
            try:
                by_name(self.detector, rollouts=Rollouts("policy"))
            except ValueError as error:
                raise SettingError("detector", str(error).removeprefix("detector: ")) from None
        if self.flawed is not None:
            self._expect("flawed", 0 <= self.flawed <= 1, "a number from 0 to 1")
            self._expect("flawed", self.advantage == "vppo", "--advantage vppo with it")

    def _check_parts(self) -> None:
        """The model, its data, and packages that options ask for."""
        for name in ("model", "data", "teacher", "rollouts"):
            self._expect(name, getattr(self, name) != "", "a name")
        self._expect("data", not self.data or self.model, "--model with it: the tiny model knows only its own problems")
        self._expect("chat", self.chat is None or self.model, "--model with it: the tiny model has a prompt of its own")
        self._expect("dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES)}")
        self._expect("lora", not self.lora or self.model, "--model with it: the tiny model has to learn to write first")
        self._expect("lora", not self.lora or find_spec("peft"), 'peft with it: pip install "prefixloss[lora]"')
        self._expect("log_to", self.log_to in (None, *TRACKERS), f"one of {', '.join(TRACKERS)}")
        there = self.log_to is None or find_spec(self.log_to)
        self._expect("log_to", there, f"that package, which is not installed: pip install {self.log_to}")

    def _check_device(self) -> None:
        self._expect("device", re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", self.device), "cpu, cuda or cuda:N")
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        usable = self.device == "cpu" or int(self.device[5:] or 0) < gpus
        self._expect("device", usable, f"cpu: PyTorch sees {gpus or 'no'} GPU{'s' * (gpus > 1)} here")

    def _check_servers(self) -> None:
        """The engine that samples, and a served teacher."""
        if self.rollouts is not None and not Address.of(self.rollouts):  # the text may hold a password
            before = " (a number of continuations is --continuations)" if self.rollouts.isdecimal() else ""
            raise SettingError("rollouts", f"expected URL or MODEL@URL with http://... or https://...{before}")
        for name in ("rollouts", "teacher"):
            if Address.of(getattr(self, name) or "") and not find_spec("httpx"):
                raise SettingError(name, "a server needs httpx, which is not installed: pip install httpx")
        self._expect("reload", self.reload in RELOADS, f"one of {', '.join(RELOADS)}")
        adapters = RELOADS[self.reload].adapters
        self._expect("reload", self.lora or not adapters, "--lora with it, whose adapters it loads")

    def _check_type(self, name: str, kinds: tuple[type, ...]) -> None:
        """A whole number is a number too, and true is none."""
        value = getattr(self, name)
        taken = (*kinds, int) if float in kinds else kinds
        try:
            right = isinstance(value, taken) and (bool in kinds or not isinstance(value, bool))
            if right and isinstance(value, int) and int not in kinds:
                float(value)
        except OverflowError:
            right = False
        if not right:
            wants = " or ".join(_KINDS[kind] for kind in kinds)
            raise SettingTypeError(name, f"got {describe(value)}, expected {wants}")

    def _expect(self, name: str, holds: object, expected: str) -> None:
        if not holds:
            raise SettingError(name, f"got {describe(getattr(self, name))}, expected {expected}")

    @property
    def tolerant(self) -> bool:
        """Whether a tolerance may leave out a part of the gradients."""
        return self.gradient_tolerance != 0 or self.head_gradient_tolerance != 0

    @classmethod
    def of(cls, values: dict[str, Any], where: str = "config.json") -> Config:
        """From a run's config.json: an earlier version's may lack a key, and none may be unknown. where: the file."""
        values = _renamed(values)
        known = {f.name for f in fields(cls)}
        for key in values:
            if key not in known:
                raise UsageError(f"--resume: config.json has an unknown key: {describe(key)} ({where})")
        try:
            return cls(**values)
        except SettingError as error:
            what = "of the wrong type" if isinstance(error, SettingTypeError) else "that cannot work"
            raise UsageError(
                f"--resume: config.json has a value {what}: {error.name}: {error.text} ({where})"
            ) from None

    @classmethod
    def read(cls, run: Path) -> Config:
        """The settings of a run."""
        path = run / "config.json"
        return cls.of(settings.read(path, f"{run} is not a run, it has no readable config.json"), str(path))


def _renamed(values: dict[str, Any]) -> dict[str, Any]:
    """An earlier version's settings under their present names: `rollouts` was the count of continuations."""
    if "continuations" in values or type(values.get("rollouts")) is not int:
        return values
    return {"continuations" if name == "rollouts" else name: value for name, value in values.items()}


def _types() -> dict[str, tuple[type, ...]]:
    return {name: get_args(kind) or (kind,) for name, kind in get_type_hints(Config).items()}


GENERAL: dict[str, Any] = {
    "threads": 0,
    "lr": 1e-6,
    "kl_coef": 0.0,
    "shorten": "prompt",
    "max_tokens": 512,
    "micro_prompts": 1,
}
