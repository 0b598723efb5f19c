"""A problem and the steps of a response as the tokens that a model reads, with something behind each step."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

STEPS = "\ue000steps\ue000"  # stands for the response in a rendered chat template


class Marked(NamedTuple):
    """ids: a response's tokens. ends: where among them each step is judged."""

    ids: list[int]
    ends: list[int]


class Reader(NamedTuple):
    """A tokenizer that nothing in a text can fool: special tokens in it, and what is named besides, are spaces."""

    tokenizer: Any

    def tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def known(self, text: str) -> list[int]:
        """A text's tokens, without those that only stand for what the tokenizer does not know."""
        return [token for token in self.tokens(text) if token != self.tokenizer.unk_token_id]

    def read(
        self, problem: str, steps: Sequence[str], behind: Sequence[int], at: int, also: str, system: str | None
    ) -> Marked:
        """Each step is tokenized by itself, with the tokens `behind` after it and judged at the one with index `at`:
        nothing that it says can move a boundary. also: another text that is special. system: the system prompt."""
        marks = {also, *self.tokenizer.all_special_tokens, STEPS} - {""}
        special = re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True))))
        plain = [special.sub(" ", step) for step in steps]
        ids, tail, head = self._frame(special.sub(" ", problem), system)
        ends = []
        for step in [head + plain[0], *plain[1:]]:
            ids += [*self.tokens(step), *behind]
            ends.append(len(ids) - len(behind) + at)
        return Marked(ids + tail, ends)

    def _frame(self, problem: str, system: str | None) -> tuple[list[int], list[int], str]:
        """The tokens before and after a response, and the text that leads up to it."""
        if self.tokenizer.chat_template is not None:
            chat = [{"role": "system", "content": system}] if system is not None else []
            chat += [{"role": "user", "content": problem}, {"role": "assistant", "content": STEPS}]
            head, _, tail = self.tokenizer.apply_chat_template(chat, tokenize=False).rpartition(STEPS)
            return [], self.tokens(tail), head
        head = "\n".join([*([] if system is None else [system]), problem, ""])
        inner, framed = self.tokens("a"), list(self.tokenizer("a")["input_ids"])
        before = next(i for i in range(len(framed)) if framed[i : i + len(inner)] == inner)
        return framed[:before], framed[before + len(inner) :], head


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """ids and mask, int64 [B, L], padded on the right, so that positions count from the start."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    return ids.to(device), mask.to(device)


def most_tokens(config: Any, tokenizer: Any) -> int:
    """How many the tokenizer and the model take: a tokenizer without a limit names a huge one."""
    of_model = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(int(tokenizer.model_max_length), int(of_model or tokenizer.model_max_length))


def device_of(name: str) -> torch.device:
    """ "auto" is the accelerator if there is one, else the CPU."""
    if name != "auto":
        return torch.device(name)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
