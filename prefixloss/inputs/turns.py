"""Turns of an agent's transcript: the stretches of tokens that the model wrote, between those that tools wrote.

A mask of the loss says which tokens are the model's own. What is scored without a gap is one turn; what a tool wrote
stands behind the turn that called it. A wrong turn is a first error like any other: `first_error_of_turn` is what the
functions of `prefixloss.advantages` take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefixloss import check
from prefixloss.inputs.layout import Layout


class Numbered(NamedTuple):
    """layout: of the mask. response, number: int64 [N], each token's response, and its turn as `turns` has it. counts:
    int64 [B], turns of each response."""

    layout: Layout
    response: Tensor
    number: Tensor
    counts: Tensor

    @classmethod
    def of(cls, mask: Tensor, cu_seqlens: Tensor | None) -> Numbered:
        check.tensor("mask", mask, "mask")
        check.rows("mask", mask)
        layout = Layout.of(mask.shape, mask.device, mask, cu_seqlens)
        response = layout.response_of_token("mask")
        goes_on = layout.scored[:-1] & (response[:-1] == response[1:])
        begins = layout.scored & ~torch.nn.functional.pad(goes_on, (1, 0))
        before = torch.nn.functional.pad(begins.long().cumsum(0), (1, 0))
        starts = before[layout.starts("mask")]
        number = torch.where(layout.scored, before[1:] - 1 - starts[:-1][response], -1)
        return cls(layout, response, number, starts.diff())


def turns(mask: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """The turn of every token, int64 shaped like `mask`: 0, 1, ... within a response, -1 outside the mask.

    mask: bool or 0/1, [B, T], or [N] with `cu_seqlens` [B + 1]; False for prompts, tools and padding.
    """
    return Numbered.of(mask, cu_seqlens).number.reshape(mask.shape)


def turn_counts(mask: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """int64 [B]: how many turns each response has."""
    return Numbered.of(mask, cu_seqlens).counts


def first_error_of_turn(wrong_turn: Tensor, mask: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """`first_error` of `prefixloss.advantages`, int64 [B]: the first token of each response's first wrong turn, counted
    in scored tokens; -1 where there is none.

    wrong_turn: int64 [B], the turn's number from 0, -1 for none. mask, cu_seqlens: as in `turns`. ValueError: a turn
    that a response does not have.
    """
    layout, response, number, counts = Numbered.of(mask, cu_seqlens)
    check.tensor("wrong_turn", wrong_turn, "integer")
    check.shape("wrong_turn", wrong_turn, counts.shape, "[B]")
    check.device("wrong_turn", wrong_turn, mask.device)
    check.none("wrong_turn", wrong_turn, wrong_turn < -1, "at least -1")
    check.none("wrong_turn", wrong_turn, wrong_turn >= counts, "below the number of its turns,", counts)
    earlier = layout.scored & (number < wrong_turn[response])
    tokens = layout.sum_by_response(earlier.double(), "mask").long()
    return torch.where(wrong_turn >= 0, tokens, -1)


class Turns(NamedTuple):
    """ids: a conversation's tokens. mask: 1 for those that the assistant wrote, else 0. spans: first token and the one
    behind the last, of each of its turns."""

    ids: list[int]
    mask: list[int]
    spans: list[tuple[int, int]]


def message_turns(tokenizer: Any, messages: Sequence[dict[str, Any]], tools: Sequence[Any] | None = None) -> Turns:
    """The assistant's turns in a conversation, by the tokenizer's own chat template.

    A turn is what the template adds to the messages before it and the prompt for an answer: tool calls and the end
    token are in it, white space behind that token is not. tokenizer: a fast one of transformers. messages, tools: as
    its `apply_chat_template` takes them. ValueError: no assistant's message, or a template that writes a message in
    another way when more follow (some leave out what was thought), so that its tokens are not those that were sampled.
    """

    def rendered(count: int, prompt: bool = False) -> str:
        return str(
            tokenizer.apply_chat_template(
                list(messages[:count]), tools=tools, tokenize=False, add_generation_prompt=prompt
            )
        )

    text = rendered(len(messages))
    places = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, behind = rendered(number, prompt=True), rendered(number + 1)
        if not (text.startswith(behind) and behind.startswith(before)):
            got = f"message {number}, which the chat template writes differently in the whole conversation"
            check.fail("messages", got, "a template that only adds to what stands before")
        end = behind.rstrip()
        places.append((len(before), len(end if tokenizer.eos_token and end.endswith(tokenizer.eos_token) else behind)))
    if not places:
        check.fail("messages", f"{len(messages)} messages, none of role 'assistant'", "at least one of the assistant's")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, ends = list(encoded["input_ids"]), [end for _, end in encoded["offset_mapping"]]

    def token_at(place: int) -> int:
        """How many tokens end at or before a character: one that straddles it belongs to what stands behind."""
        return next((k for k, end in enumerate(ends) if end > place), len(ends))

    spans = [(token_at(a), token_at(b)) for a, b in places]
    mask = [int(any(a <= k < b for a, b in spans)) for k in range(len(ids))]
    return Turns(ids, mask, spans)
