"""Text to steps, and steps to tokens: where in a response each step starts.

A segmenter cuts a text into spans that tile it: joined, they are the text. Tokens are matched to characters by
decoding: the tokens before a boundary are the fewest whose text reaches it, and a token that straddles it counts to the
step after it, so that no part of an error is ever rewarded.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

from prefixloss import check

Segmenter = Literal["markers", "blank-lines", "lines", "sentences"]
SEGMENTERS: tuple[Segmenter, ...] = get_args(Segmenter)

# what asks a model for steps that can be cut and for an answer that can be checked
INSTRUCTION = """Solve the problem in numbered steps. Start each step with "Step 1:", "Step 2:" and so on, and leave a \
blank line between steps. Write every calculation as an equality such as 3*4=12. End with the answer in \\boxed{{}}.

Problem: {question}
"""

# "Step 3", "**Step 3: ...**", "## Step 3"; else a numbered list: "3.", "3)", "**3.**"
_STEP = re.compile(r"^[*#_> \t]*step[ \t]+([0-9]{1,6})\b", re.MULTILINE | re.IGNORECASE)
_NUMBER = re.compile(r"^[*#_> \t]*([0-9]{1,6})[.)](?=[*_]*(?:[ \t]|$))", re.MULTILINE)
# after a full stop, a question or exclamation mark, with closing quotes or brackets; "3.5" and "e.g." end nothing
_SENTENCE = re.compile(r"(?<![ (.][a-z]\.[a-z])(?<!\b[A-Z])[.!?][\"')\]]*(?:[ \t]+(?=[^a-z\s])|[ \t]*\n+)\s*")
_BLANK_LINE = re.compile(r"\n[ \t]*\r?\n\s*")


class Span(NamedTuple):
    """Characters start to end of a text."""

    start: int
    end: int

    def of(self, text: str) -> str:
        return text[self.start : self.end]


def split(text: str, by: Segmenter = "markers") -> list[Span]:
    """The steps of a text; one step if nothing marks them, none if the text is empty.

    markers: "Step 1", "Step 2", ... in order (else a numbered list) start the steps; text before the first belongs to
    it. blank-lines, lines, sentences: each step takes the white space after it.
    """
    cuts: dict[str, Callable[[str], list[int]]] = {
        "markers": _marker_starts,
        "blank-lines": lambda t: [m.end() for m in _BLANK_LINE.finditer(t)],
        "lines": lambda t: [m.end() for m in re.finditer(r"\r?\n|\r", t)],
        "sentences": lambda t: [m.end() for m in _SENTENCE.finditer(t)],
    }
    if not isinstance(text, str):
        check.fail("text", type(text).__name__, "a string", TypeError)
    if not isinstance(by, str) or by not in cuts:
        check.fail("by", check.describe(by), " | ".join(map(repr, cuts)))
    if not text:
        return []
    inner = [cut for cut in cuts[by](text) if 0 < cut < len(text)]
    return [Span(*pair) for pair in pairwise([0, *inner, len(text)])]


def _marker_starts(text: str) -> list[int]:
    """Where steps 2, 3, ... start: only markers that count up from 1, so that a number in passing starts nothing."""
    for pattern in (_STEP, _NUMBER):
        starts: list[int] = []
        for match in pattern.finditer(text):
            if int(match[1]) == len(starts) + 1:
                starts.append(match.start())
        if starts:
            return starts[1:]
    return []


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of sampled tokens, special ones left out, exactly as it was written."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def token_boundaries(tokenizer: Any, ids: Sequence[int], offsets: Sequence[int]) -> list[int]:
    """For each character offset into `decode(tokenizer, ids)`: how many of the first tokens lie wholly before it.

    tokenizer: a fast tokenizer of transformers. Where it makes the same tokens of the text again, its own offsets say
    where to look; where it does not (sampled tokens need not be canonical) a search does. Both are settled by decoding.
    """
    ids = list(ids)
    text = decode(tokenizer, ids)
    for offset in offsets:
        if not check.is_whole(offset) or offset > len(text):
            check.fail("offsets", check.describe(offset), f"whole numbers from 0 to {len(text)}, the text's length")
    reached: dict[int, int] = {0: 0, len(ids): len(text)}

    def reach(count: int) -> int:
        """Characters of the text that the first `count` tokens complete: half a character is none."""
        if count not in reached:
            reached[count] = _shared(decode(tokenizer, ids[:count]), text)
        return reached[count]

    guesses = _guesses(tokenizer, ids, text, offsets)
    return [_before(reach, len(ids), offset, guess) for offset, guess in zip(offsets, guesses, strict=True)]


def _before(reach: Callable[[int], int], tokens: int, offset: int, guess: int | None) -> int:
    """The fewest tokens that reach the offset exactly, or all before the one that runs over it."""
    count = guess
    if count is None or not (reach(count) >= offset and (count == 0 or reach(count - 1) < offset)):
        count = bisect_left(range(tokens + 1), offset, key=reach)
    return count if reach(min(count, tokens)) == offset else max(0, count - 1)


def _guesses(tokenizer: Any, ids: list[int], text: str, offsets: Sequence[int]) -> list[int | None]:
    """By the tokenizer's own offsets: the first token that ends at or after each character offset, counted from 1."""
    again = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if list(again["input_ids"]) != ids:
        return [None] * len(offsets)
    ends = [end for _, end in again["offset_mapping"]]
    return [min(bisect_left(ends, offset) + 1, len(ids)) if offset else 0 for offset in offsets]


def _shared(start: str, text: str) -> int:
    """How many characters two texts have in common at their start."""
    if text.startswith(start):
        return len(start)
    pairs = enumerate(zip(start, text, strict=False))
    return next((i for i, (a, b) in pairs if a != b), len(text))


def step_tokens(tokenizer: Any, ids: Sequence[int], by: Segmenter = "markers") -> tuple[list[str], list[int]]:
    """The steps of a sampled response, as text, and the index of each one's first token."""
    text = decode(tokenizer, ids)
    spans = split(text, by)
    return [span.of(text) for span in spans], token_boundaries(tokenizer, ids, [span.start for span in spans])


def turn_tokens(tokenizer: Any, ids: Sequence[int], own: Sequence[int]) -> tuple[list[str], list[int]]:
    """The turns of an agent's transcript, as text, and the index of each one's first token.

    own: 0 or 1 a token, 1 for what the model wrote. What a tool wrote stands behind the turn that called it, for
    whoever judges that turn to see; what stands before the first turn is left out.
    """
    if len(own) != len(ids):
        check.fail("own", f"{len(own)} entries", f"{len(ids)}, one for each token")
    starts = [k for k, mine in enumerate(own) if mine and not (k and own[k - 1])]
    return [decode(tokenizer, ids[a:b]) for a, b in pairwise([*starts, len(ids)])], starts


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token completes: joined, they are `decode(tokenizer, ids)`. A token that completes no
    character, a special one or half a character, has none."""
    text = decode(tokenizer, ids)
    ends = [_shared(decode(tokenizer, ids[:count]), text) for count in range(len(ids))]
    return [text[a:b] for a, b in pairwise([*ends, len(text)])]
