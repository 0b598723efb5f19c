"""What is measured on: heads of real models by name, token counts, data types, and the sets that bundle them."""

from __future__ import annotations

from typing import Any, NamedTuple

from .methods import METHODS
from .settings import GROUP, SETTINGS, is_setting

DTYPES = ("float32", "bfloat16", "float16")
STARTS = ("hidden", "logits")


class Head(NamedTuple):
    """An LM head: hidden size D, vocabulary V (rows of the weight, padding included), and the cap on its logits."""

    name: str
    width: int
    vocabulary: int
    softcap: float | None = None

    @property
    def entries(self) -> int:
        return self.width * self.vocabulary


# hidden_size, vocab_size and final_logit_softcapping of the models' own config.json
HEADS = {
    head.name: head
    for head in (
        Head("qwen3-0.6b", 1024, 151_936),
        Head("qwen3-4b", 2560, 151_936),
        Head("qwen3-8b", 4096, 151_936),
        Head("llama-3-8b", 4096, 128_256),
        Head("gemma-2-2b", 2304, 256_000, 30.0),
        # no model's: where the products are small against the softmax, and where they are most of the work
        Head("narrow", 128, 32_768),
        Head("wide", 1024, 32_768),
    )
}


class Case(NamedTuple):
    """One shape for all methods. group: the set it came from. start: "hidden" states or "logits"."""

    group: str
    head: Head
    tokens: int
    dtype: str
    setting: str
    start: str = "hidden"

    @property
    def name(self) -> str:
        return f"{self.head.name}, {self.tokens:,} tokens, {self.dtype}, {self.setting}, from {self.start}"

    def as_json(self) -> dict[str, Any]:
        return {**self._asdict(), "head": self.head._asdict(), "name": self.name}

    @classmethod
    def of(cls, given: dict[str, Any]) -> Case:
        fields = {name: given[name] for name in cls._fields}
        return cls(**{**fields, "head": Head(**fields["head"])})


def head_of(text: str) -> Head:
    """A name of `HEADS`, or D x V as in "1024x32768"; a ValueError says what is wrong."""
    if text in HEADS:
        return HEADS[text]
    width, _, vocabulary = text.partition("x")
    if not (width.isdigit() and vocabulary.isdigit() and int(width) > 0 and int(vocabulary) > 1):
        raise ValueError(f"got {text!r}, expected D x V as in 1024x32768, or one of {', '.join(HEADS)}")
    return Head(text, int(width), int(vocabulary))


def count_of(text: str) -> int:
    """Tokens: "2048", "16k" (x 1,024) or "1m" (x 1,048,576); a ValueError says what is wrong."""
    scale = {"k": 2**10, "m": 2**20}.get(text[-1:].lower(), 1)
    digits = text[:-1] if scale > 1 else text
    if not digits.isdigit() or not int(digits):
        raise ValueError(f"got {text!r}, expected a number of tokens as in 2048, 16k or 1m")
    return int(digits) * scale


def dtype_of(text: str, option: str) -> str:
    """One of `DTYPES`; a ValueError says what is wrong with that option."""
    if text not in DTYPES:
        raise ValueError(f"{option}: got {text!r}, expected one of {', '.join(DTYPES)}")
    return text


FLOOR = [
    Case("floor", HEADS[head], tokens, dtype, "dense", start)
    for start, head, tokens in (("hidden", "narrow", 2048), ("hidden", "wide", 1024), ("logits", "narrow", 2048))
    for dtype in ("float32", "bfloat16")
]
REAL_SETTINGS = tuple(name for name in SETTINGS if name != "dense")
SMALL = Head("512x16384", 512, 16_384)
SHARES = ("solved-0", "solved-25", "solved-50", "solved-75")


def default_cases(device: str) -> list[Case]:
    """About half an hour on two CPU cores; on a GPU the same questions at its own sizes and in its own dtype."""
    if device == "cpu":
        dtype, model, tokens = "float32", HEADS["qwen3-0.6b"], 2**8
        swept, swept_tokens, lengths = SMALL, 2**12, range(10, 14)
    else:
        dtype, model, tokens = "bfloat16", HEADS["qwen3-4b"], 2**14
        swept, swept_tokens, lengths = HEADS["qwen3-0.6b"], 2**15, range(10, 21, 2)
    return [
        *FLOOR,
        *(Case("models", model, tokens, dtype, setting) for setting in REAL_SETTINGS),
        *(Case("length", swept, 2**power, dtype, "grpo") for power in lengths),
        *(Case("share", swept, swept_tokens, dtype, setting) for setting in SHARES),
    ]


def quick_cases() -> list[Case]:
    """About a minute: a shape small enough that every method answers at once."""
    head = Head("256x8192", 256, 8192)
    return [
        *(Case("floor", head, 1024, dtype, "dense", "hidden") for dtype in ("float32", "bfloat16")),
        Case("floor", head, 1024, "float32", "dense", "logits"),
        *(Case("length", head, length, "float32", "grpo") for length in (512, 2048)),
        *(Case("share", head, 1024, "float32", setting) for setting in SHARES[::2]),
    ]


def methods_for(case: Case, quick: bool) -> list[str]:
    """Who takes part where nobody was asked for: in sweeps and in most real settings, those that need no compiling."""
    every = METHODS[case.start]
    few = quick or case.group in ("length", "share") or (case.group == "models" and case.setting != "grpo")
    return [name for name, method in every.items() if not (few and method.compiles)]


def custom_cases(
    heads: list[Head], tokens: list[int], dtypes: list[str], settings: list[str], starts: list[str]
) -> list[Case]:
    """Every combination; a ValueError names the option that is wrong. Logits come in the dense setting alone."""
    for option, values, known in (("--dtypes", dtypes, DTYPES), ("--starts", starts, STARTS)):
        for value in values:
            if value not in known:
                raise ValueError(f"{option}: got {value!r}, expected one of {', '.join(known)}")
    for value in settings:
        if not is_setting(value):
            raise ValueError(f"--settings: got {value!r}, expected one of {', '.join(SETTINGS)}, solved-PERCENT")
    if min(tokens) < GROUP:
        raise ValueError(f"--tokens: got {min(tokens)}, expected at least {GROUP}, one for each response of a group")
    if "logits" in starts and "dense" not in settings:
        raise ValueError(f"--starts: got 'logits' with the settings {', '.join(settings)}, expected 'dense' among them")
    return [
        Case("custom", head, count, dtype, setting, start)
        for start in starts
        for head in heads
        for count in tokens
        for dtype in dtypes
        for setting in settings
        if start == "hidden" or setting == "dense"
    ]
