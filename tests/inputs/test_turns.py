"""Turns of transcripts: from masks and from messages, the first wrong one, and advantages by turn, all by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prefixloss import advantages
from prefixloss.inputs.turns import first_error_of_turn, message_turns, turn_counts, turns
from prefixloss.steps import turn_tokens

# turns: 2 + 1 + 1 tokens; 1; none; the last begins at once
MASK = torch.tensor([[0, 1, 1, 0, 1, 0, 1], [0, 0, 1, 0, 0, 0, 0], [0] * 7, [1, 1, 0, 0, 1, 1, 1]])
NUMBERS = torch.tensor([[-1, 0, 0, -1, 1, -1, 2], [-1, -1, 0, -1, -1, -1, -1], [-1] * 7, [0, 0, -1, -1, 1, 1, 1]])
OFFSETS = torch.arange(5) * 7


def test_a_turn_is_what_is_scored_without_a_gap() -> None:
    assert torch.equal(turns(MASK), NUMBERS)
    assert torch.equal(turns(MASK.bool()), NUMBERS)
    assert turn_counts(MASK).tolist() == [3, 1, 0, 2]
    # packed, the last token of row 2 stands beside the first of row 3
    packed = MASK.clone()
    packed[2, 6] = 1
    want = NUMBERS.clone()
    want[2, 6] = 0
    assert torch.equal(turns(packed.reshape(-1), OFFSETS), want.reshape(-1))
    assert turn_counts(packed.reshape(-1), OFFSETS).tolist() == [3, 1, 1, 2]
    with pytest.raises(ValueError, match="cu_seqlens"):
        turns(MASK.reshape(-1))


def test_the_first_wrong_turn_is_a_first_error_in_scored_tokens() -> None:
    assert first_error_of_turn(torch.tensor([1, 0, -1, 1]), MASK).tolist() == [2, 0, -1, 2]
    assert first_error_of_turn(torch.tensor([2, -1, -1, 0]), MASK.reshape(-1), OFFSETS).tolist() == [3, -1, -1, 0]
    spread = advantages.vppo(
        torch.tensor([False, True, False, False]), MASK.sum(1), first_error_of_turn(torch.tensor([2, -1, -1, 1]), MASK),
        torch.zeros(4, dtype=torch.int64), shorten=0,
    )  # fmt: skip
    row = spread.per_token(MASK, MASK)[0].tolist()
    assert row[1] == row[2] == row[4] > row[6]
    assert row[0] == row[3] == row[5] == 0


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ([3, 0, -1, 0], "wrong_turn: got 3 for response 0, expected below the number of its turns, 3"),
        ([0, 0, 0, 0], "wrong_turn: got 0 for response 2, expected below the number of its turns, 0"),
        ([-2, 0, -1, 0], "wrong_turn: got -2 for response 0, expected at least -1"),
        ([0, 0], r"wrong_turn: got shape \[2\]"),
    ],
)
def test_a_turn_that_is_not_there_is_refused(wrong: list[int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        first_error_of_turn(torch.tensor(wrong), MASK)


# ---- messages

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}!{{ c }}{% endfor %}"
    "{% if m.role == 'assistant' %}<eos>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(template: str = CHAT) -> Any:
    """A token a character, but roles and the end whole, and "?4" one: it runs over what a tool and a model say."""
    words = ["<pad>", "<unk>", "<eos>", "<user>", "<assistant>", "<tool>", "?4", "\n", *"0123456789abcdefghij+=?! "]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"<[a-z]+>|\?4|[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    made.chat_template = template
    return made


MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "1+2=?"},
    {"role": "assistant", "content": "a", "tool_calls": ["b"]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "=3"},
]


def test_the_turns_of_messages_are_what_the_template_lets_the_model_write() -> None:
    tok = tokenizer()
    made = message_turns(tok, MESSAGES)
    assert [tok.decode(made.ids[a:b]) for a, b in made.spans] == ["a!b<eos>", "=3<eos>"]
    assert tok.decode(made.ids) == "<user>1+2=?<assistant>a!b<eos>\n<tool>3<assistant>=3<eos>\n"
    assert [tok.decode([i]) for i, own in zip(made.ids, made.mask, strict=True) if own] == [
        *"a!b",
        "<eos>",
        *"=3",
        "<eos>",
    ]
    assert turn_counts(torch.tensor([made.mask])).tolist() == [2]
    # a token that runs over both belongs to the turn; without an end token all is the turn's
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}"
    straddled = message_turns(
        tokenizer(plain), [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "4\n"}]
    )
    assert straddled.spans == [(1, 3)]


def test_messages_without_turns_of_their_own_are_refused() -> None:
    with pytest.raises(ValueError, match="messages: got 1 messages, none of role 'assistant'"):
        message_turns(tokenizer(), MESSAGES[:1])
    forgets = "{% for m in messages %}{{ m.content if loop.last or m.role != 'assistant' else '' }}{% endfor %}"
    with pytest.raises(ValueError, match="messages: got message 1, which the chat template writes differently"):
        message_turns(tokenizer(forgets), MESSAGES)


def test_a_turn_s_text_has_what_its_tools_answered() -> None:
    tok = tokenizer()
    ids, own = tok("9a!b3=4")["input_ids"], [0, 1, 1, 1, 0, 1, 1]
    assert turn_tokens(tok, ids, own) == (["a!b3", "=4"], [1, 5])
    assert turn_tokens(tok, ids, [0] * 7) == ([], [])
    with pytest.raises(ValueError, match="own: got 1 entries, expected 7"):
        turn_tokens(tok, ids, [1])


# ---- advantages

ROWS = torch.tensor([[1, 1, 0, 1, 0, 1, 0], [1, 0, 0, 1, 1, 0, 0]])
REWARDS, OF_TURNS = torch.tensor([1.0, 0.0]), torch.tensor([[0.0, 5.0, math.nan], [1.0, math.nan, math.nan]])
GROUP = torch.zeros(2, dtype=torch.int64)


def test_turn_level_advantages_by_hand() -> None:
    """Outcomes +-1/sqrt(2). The first turns' rewards 0 and 1 are -+1/sqrt(2); a second turn that is not the last has
    only the first response, a group of one, and the last turns have the outcome alone. With weight 2: 1 - 2, 1, 1."""
    h = 0.5**0.5
    got = advantages.turn_level(REWARDS, OF_TURNS, GROUP, ROWS, weight=2.0)
    want = torch.tensor([[-h, -h, 0, h, 0, h, 0], [h, 0, 0, -h, -h, 0, 0]])
    torch.testing.assert_close(got, want)
    packed = advantages.turn_level(
        REWARDS, OF_TURNS, GROUP, ROWS.reshape(-1), cu_seqlens=torch.tensor([0, 7, 14]), weight=2.0
    )
    torch.testing.assert_close(packed, want.reshape(-1))
    # without the division: +-0.5 each
    plain = advantages.turn_level(REWARDS, OF_TURNS, GROUP, ROWS, std=False)
    torch.testing.assert_close(plain, torch.tensor([[0, 0, 0, 0.5, 0, 0.5, 0], [0, 0, 0, -0.5, -0.5, 0, 0]]))
    # turns that earn nothing leave GRPO
    none = advantages.turn_level(REWARDS, OF_TURNS, GROUP, ROWS, weight=0.0)
    torch.testing.assert_close(none, advantages.grpo(REWARDS, GROUP)[:, None] * ROWS)


def test_turns_are_compared_within_their_group_and_where_there_is_a_verdict() -> None:
    rows = ROWS.repeat(2, 1)
    rewards, earned = REWARDS.repeat(2), OF_TURNS.repeat(2, 1)
    both = advantages.turn_level(rewards, earned, torch.tensor([7, 7, 3, 3]), rows)
    torch.testing.assert_close(both, advantages.turn_level(REWARDS, OF_TURNS, GROUP, ROWS).repeat(2, 1))
    rewards[3] = math.nan
    judged = torch.tensor([True, True, True, False])
    some = advantages.turn_level(rewards, earned, torch.zeros(4).long(), rows, judged=judged)
    three = advantages.turn_level(rewards[:3], earned[:3], torch.zeros(3).long(), rows[:3])
    torch.testing.assert_close(some, torch.cat([three, torch.zeros(1, 7)]))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"turn_rewards": torch.zeros(2, 1)}, r"turn_rewards: got shape \[2, 1\], expected \[2, 2\] or more turns"),
        ({"turn_rewards": torch.zeros(2)}, r"turn_rewards: got shape \[2\]"),
        ({"turn_rewards": torch.tensor([[0.0, math.nan], [0, 0]])}, "turn_rewards: got nan for response 0"),
        ({"rewards": torch.zeros(3), "group_ids": torch.zeros(3).long()}, r"rewards: got shape \[3\]"),
        ({"weight": math.inf}, "weight: got inf"),
        ({"std": False, "std_floor": 0.1}, "std_floor: got 0.1"),
    ],
)
def test_wrong_arguments_are_named(given: dict[str, Any], says: str) -> None:
    plain = {"rewards": REWARDS, "turn_rewards": OF_TURNS, "group_ids": GROUP, "mask": ROWS}
    with pytest.raises(ValueError, match=says):
        advantages.turn_level(**{**plain, **given})
