"""What the benchmark measures on: heads, token counts, and shares of learning tokens against an independent count."""

from __future__ import annotations

import pytest
import torch

from bench.speed.cases import (
    HEADS,
    SHARES,
    Case,
    count_of,
    custom_cases,
    default_cases,
    head_of,
    methods_for,
    quick_cases,
)
from bench.speed.inputs import padding
from bench.speed.methods import METHODS
from bench.speed.settings import GROUP, SETTINGS, Batch, credit_of, generate, is_setting, setting_of

SIZES = [64, 1000, 4096]


def learns(name: str, batch: Batch) -> list[bool]:
    """Token by token in plain Python, from the definitions: which have an advantage other than 0."""
    found = []
    groups: dict[int, list[int]] = {}
    for i, group in enumerate(batch.group_ids.tolist()):
        groups.setdefault(group, []).append(i)
    for members in groups.values():
        outcomes = [bool(batch.correct[i]) for i in members]
        lengths = [int(batch.lengths[i]) for i in members]
        errors = [int(batch.first_error[i]) for i in members]
        cut = [max(0, e - n // 10) if e >= 0 else 0 for e, n in zip(errors, lengths, strict=True)]
        average = [1.0 if o else 0.5 * c / n for o, c, n in zip(outcomes, cut, lengths, strict=True)]
        baseline = sum(average) / len(average)
        mixed = len(set(outcomes)) == 2
        for right, length, error, good in zip(outcomes, lengths, errors, cut, strict=True):
            for at in range(length):
                if name == "dense":
                    found.append(True)
                elif name == "neutral-prefix":
                    found.append(mixed and (right or at >= error))
                elif name == "vppo-relu":
                    found.append(baseline < 1 if right else at >= good or baseline < 0.5)
                else:
                    found.append(mixed)
    return found


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize("name", [*SETTINGS, *SHARES])
def test_learning_tokens_are_those_of_an_independent_count(name: str, tokens: int) -> None:
    setting = setting_of(name)
    batch, credit = generate(tokens, setting), credit_of(tokens, setting)
    # groups lie one after the other, so the count's order is the tokens'
    assert credit.learning(setting).tolist() == learns(name, batch)


@pytest.mark.parametrize("tokens", [8, 9, *SIZES, 2**20])
@pytest.mark.parametrize("name", SETTINGS)
def test_lengths_add_up_and_errors_lie_in_wrong_responses(name: str, tokens: int) -> None:
    batch = generate(tokens, SETTINGS[name])
    assert batch.lengths.sum() == tokens
    assert batch.lengths.min() >= 1
    assert len(batch.lengths) % GROUP == 0
    assert (batch.first_error[batch.correct] == -1).all()
    wrong = ~batch.correct
    assert (batch.first_error[wrong] >= 0).all()
    assert (batch.first_error[wrong] < batch.lengths[wrong]).all()


def test_prefixes_are_a_third_of_wrong_responses_and_one_response_in_eight_errs_at_once() -> None:
    # 1,024 responses a seed, about 640 of them wrong; the standard error of a mean share is 0.24 / sqrt(2560) = 0.005
    batches = [generate(2**22, SETTINGS["grpo"], seed) for seed in range(4)]
    shares = torch.cat([(b.first_error / b.lengths)[~b.correct] for b in batches])
    assert shares.mean() == pytest.approx(0.34, abs=0.02)
    assert (shares == 0).float().mean() == pytest.approx(0.12, abs=0.03)


@pytest.mark.parametrize(("name", "share"), [("half-solved", 0.5), ("solved-0", 1.0), ("solved-75", 0.25)])
def test_solved_groups_take_their_share_of_the_tokens_out(name: str, share: float) -> None:
    # 128 groups of 8 responses with uniform lengths: their sizes differ by a tenth from the mean
    credit = credit_of(2**22, setting_of(name))
    assert credit.learning(setting_of(name)).float().mean() == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize(
    ("text", "known"),
    [("solved-0", True), ("solved-99", True), ("solved-100", False), ("solved-07", False), ("x", False)],
)
def test_settings_have_names(text: str, known: bool) -> None:
    assert is_setting(text) == known


def test_heads_are_those_of_the_models() -> None:
    # hidden_size, vocab_size and final_logit_softcapping in each model's config.json
    assert {name: tuple(head[1:]) for name, head in HEADS.items() if name not in ("narrow", "wide")} == {
        "qwen3-0.6b": (1024, 151936, None),
        "qwen3-4b": (2560, 151936, None),
        "qwen3-8b": (4096, 151936, None),
        "llama-3-8b": (4096, 128256, None),
        "gemma-2-2b": (2304, 256000, 30.0),
    }


@pytest.mark.parametrize(("text", "count"), [("2048", 2048), ("16k", 16384), ("1M", 2**20)])
def test_tokens_can_be_counted_in_thousands(text: str, count: int) -> None:
    assert count_of(text) == count


@pytest.mark.parametrize("text", ["", "k", "0", "-1", "1.5k", "many"])
def test_wrong_counts_are_named(text: str) -> None:
    with pytest.raises(ValueError, match="expected a number of tokens"):
        count_of(text)


@pytest.mark.parametrize("text", ["qwen", "10x", "x10", "0x5", "5x1", "3x4x5"])
def test_wrong_heads_are_named(text: str) -> None:
    with pytest.raises(ValueError, match="expected D x V"):
        head_of(text)


def test_cases_survive_json() -> None:
    for case in (*default_cases("cpu"), *default_cases("cuda"), *quick_cases()):
        assert Case.of(case.as_json()) == case
        assert methods_for(case, quick=False)


def test_the_default_has_the_floor_in_both_precisions_a_real_model_in_every_setting_and_both_sweeps() -> None:
    cases = default_cases("cpu")
    floor = {(c.head.width, c.head.vocabulary, c.tokens, c.dtype) for c in cases if c.group == "floor"}
    assert {(d, 32768, n, t) for d, n in ((128, 2048), (1024, 1024)) for t in ("float32", "bfloat16")} <= floor
    real = {c.setting for c in cases if c.group == "models" and c.head.name == "qwen3-0.6b" and c.tokens == 256}
    assert real == {"grpo", "vppo-relu", "neutral-prefix", "half-solved"}
    assert [c.tokens for c in cases if c.group == "length"] == [1024, 2048, 4096, 8192]
    assert max(c.tokens for c in default_cases("cuda") if c.group == "length") == 2**20
    shares = [
        credit_of(c.tokens, setting_of(c.setting)).learning(setting_of(c.setting)) for c in cases if c.group == "share"
    ]
    assert len({int(share.sum()) for share in shares}) == 4


def test_custom_cases_are_every_combination_with_logits_in_the_dense_setting_alone() -> None:
    head = head_of("16x64")
    cases = custom_cases([head], [64, 128], ["float32"], ["dense", "grpo"], ["hidden", "logits"])
    assert [(c.tokens, c.setting, c.start) for c in cases] == [
        (64, "dense", "hidden"), (64, "grpo", "hidden"), (128, "dense", "hidden"), (128, "grpo", "hidden"),
        (64, "dense", "logits"), (128, "dense", "logits"),
    ]  # fmt: skip


def test_padding_puts_every_token_in_its_response() -> None:
    index, mask = padding(torch.tensor([2, 1, 3]), torch.device("cpu"))
    assert index.tolist() == [[0, 1, 0], [2, 0, 0], [3, 4, 5]]
    assert mask.tolist() == [[True, True, False], [True, False, False], [True, True, True]]


def test_every_start_has_a_floor_and_ours() -> None:
    assert all({"floor", "ours"} <= set(methods) for methods in METHODS.values())
