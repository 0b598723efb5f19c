"""Wrong calls fail before any work, with the argument's name, what it got and what it expects."""

import dataclasses
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from prefixloss import LossConfig, TokenAdvantages, advantages, linear_logps, linear_prefix_loss, prefix_loss

B, T, D, V = 2, 3, 4, 5
N = B * T


def linear(layout: str = "padded", **changes: Any) -> dict[str, Any]:
    """Arguments of a right call, as keywords, with `changes`."""
    shape = (B, T) if layout == "padded" else (N,)
    base = {
        "hidden": torch.randn(*shape, D),
        "lm_head_weight": torch.randn(V, D),
        "tokens": torch.zeros(shape, dtype=torch.int64),
        "advantages": torch.ones(shape),
        "backend": "torch",
    }
    return base | changes


def from_logits(layout: str = "padded", **changes: Any) -> dict[str, Any]:
    base = linear(layout)
    del base["hidden"], base["lm_head_weight"]
    return base | {"logits": torch.randn(*base["tokens"].shape, V)} | changes


def pair(size: int = B) -> TokenAdvantages:
    return TokenAdvantages(torch.ones(size), -torch.ones(size), torch.ones(size, dtype=torch.int64))


def raises(kind: type[Exception], words: str, function: Callable[..., Any], **arguments: Any) -> None:
    with pytest.raises(kind) as caught:
        function(**arguments)
    assert type(caught.value) is kind, f"{type(caught.value)} is not {kind}"
    for word in words.split():
        assert word in str(caught.value), f"{word!r} is missing in: {caught.value}"


def test_the_right_calls_are_right() -> None:
    """Otherwise every test below could pass for the wrong reason."""
    for layout in ("padded", "packed"):
        linear_prefix_loss(**linear(layout))
        prefix_loss(**from_logits(layout))
    cu = torch.tensor([0, 3, 6])
    linear_prefix_loss(**linear("packed", advantages=torch.ones(B), cu_seqlens=cu))
    linear_prefix_loss(**linear("packed", advantages=pair(), cu_seqlens=cu))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(
    ("words", "changes"),
    [
        # the names, then the sizes it got and wants
        ("lm_head_weight 4 9", {"lm_head_weight": torch.randn(V, 9)}),
        ("lm_head_weight", {"lm_head_weight": torch.randn(V)}),
        ("tokens 3 7", {"tokens": torch.zeros(B, 7, dtype=torch.int64)}),
        ("hidden", {"hidden": torch.randn(D)}),
        ("advantages 2 3 7", {"advantages": torch.ones(B, 7)}),
        ("advantages 2 5", {"advantages": torch.ones(5)}),
        ("mask 2 3 7", {"mask": torch.ones(B, 7, dtype=torch.bool)}),
        ("old_logps 2 3 7", {"old_logps": torch.zeros(B, 7)}),
        ("old_logps 2 3 6", {"old_logps": torch.zeros(N)}),
        (
            "sampler_logps 2 3 7",
            {"sampler_logps": torch.zeros(B, 7), "config": LossConfig(sampler_correction="tis")},
        ),
        ("ref_logps 2 3 7", {"ref_logps": torch.zeros(B, 7), "config": LossConfig(kl="k3", kl_coef=0.1)}),
        ("lm_head_bias 5 6", {"lm_head_bias": torch.zeros(V + 1)}),
        (
            "group_ids 2 3",
            {
                "group_ids": torch.zeros(3, dtype=torch.int64),
                "config": LossConfig(reduction="group-token-mean"),
            },
        ),
        ("prefix", {"advantages": pair(3)}),
        ("normalizer", {"normalizer": torch.ones(2)}),
    ],
)
def test_shapes_that_do_not_fit(backend: str, words: str, changes: dict[str, Any]) -> None:
    raises(ValueError, words, linear_prefix_loss, **linear(**(changes | {"backend": backend})))


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("ref_hidden 2 3 7", {"ref_hidden": torch.randn(B, 7, D)}),
        ("ref_lm_head_weight 5 6", {"ref_lm_head_weight": torch.randn(V + 1, D)}),
        ("ref_lm_head_weight 4 9", {"ref_lm_head_weight": torch.randn(V, 9)}),
        ("ref_lm_head_bias 5 6", {"ref_lm_head_bias": torch.zeros(V + 1)}),
    ],
)
def test_reference_shapes_that_do_not_fit(words: str, changes: dict[str, Any]) -> None:
    right = {
        "ref_hidden": torch.randn(B, T, D),
        "ref_lm_head_weight": torch.randn(V, D),
        "config": LossConfig(kl="full", kl_coef=0.1),
    }
    linear_prefix_loss(**linear(**right))
    raises(ValueError, words, linear_prefix_loss, **linear(**(right | changes)))


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("tokens 3 7", {"tokens": torch.zeros(B, 7, dtype=torch.int64)}),
        ("logits", {"logits": torch.randn(V)}),
        (
            "ref_logits 5 6",
            {"ref_logits": torch.randn(B, T, V + 1), "config": LossConfig(kl="full", kl_coef=0.1)},
        ),
    ],
)
def test_logit_shapes_that_do_not_fit(words: str, changes: dict[str, Any]) -> None:
    raises(ValueError, words, prefix_loss, **from_logits(**changes))


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("lm_head_weight 4 9", {"lm_head_weight": torch.randn(V, 9)}),
        ("tokens 3 7", {"tokens": torch.zeros(B, 7, dtype=torch.int64)}),
        ("mask 2 3 7", {"mask": torch.ones(B, 7, dtype=torch.bool)}),
        ("lm_head_bias 5 6", {"lm_head_bias": torch.zeros(V + 1)}),
        ("temperature 0", {"temperature": 0.0}),
        ("softcap -1", {"softcap": -1.0}),
        ("backend cuda torch reference", {"backend": "cuda"}),
    ],
)
def test_linear_logps_refuses_the_same(words: str, changes: dict[str, Any]) -> None:
    arguments = linear(**changes)
    del arguments["advantages"]
    raises(ValueError, words, linear_logps, **arguments)


@pytest.mark.parametrize("function", [linear_prefix_loss, prefix_loss])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        # the option, what it got, and one thing it would take
        ({"objective": "ppo"}, "objective ppo clip sapo"),
        ({"ratio_level": "response"}, "ratio_level response sequence"),
        ({"sampler_correction": "cis"}, "sampler_correction cis icepop"),
        ({"kl": "k4"}, "kl k4 full"),
        ({"reduction": "mean"}, "reduction mean token-mean"),
        ({"stats": "all"}, "stats all scored"),
        ({"clip_low": -0.1}, "clip_low -0.1"),
        ({"clip_high": -0.1}, "clip_high -0.1"),
        ({"clip_low": float("nan")}, "clip_low nan"),
        ({"ratio_cap": 0.0}, "ratio_cap 0"),
        ({"dual_clip": 0.5}, "dual_clip 0.5"),
        ({"sapo_tau": (0.0, 1.0)}, "sapo_tau 0"),
        ({"sapo_tau": (1.0, -1.0)}, "sapo_tau -1"),
        ({"sampler_bounds": (2.0, 1.0)}, "sampler_bounds 2 1"),
        ({"sampler_bounds": (-1.0, 1.0)}, "sampler_bounds -1"),
        ({"max_length": 0, "reduction": "constant"}, "max_length 0"),
        ({"temperature": 0.0}, "temperature 0"),
        ({"temperature": -1.0}, "temperature -1"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"softcap": 0.0}, "softcap 0"),
        ({"row_tolerance": -1e-3}, "row_tolerance -0.001"),
        ({"chunk_tokens": 0}, "chunk_tokens 0"),
    ],
)
def test_option_values_outside_their_range(function: Callable[..., Any], options: dict[str, Any], words: str) -> None:
    arguments = linear() if function is linear_prefix_loss else from_logits()
    raises(ValueError, words, lambda: function(**arguments, config=LossConfig(**options)))


def test_constant_reduction_without_a_length() -> None:
    raises(
        ValueError,
        "max_length constant",
        lambda: linear_prefix_loss(**linear(), config=LossConfig(reduction="constant")),
    )


@pytest.mark.parametrize(("function", "arguments"), [(linear_prefix_loss, linear), (prefix_loss, from_logits)])
def test_unknown_backend(function: Callable[..., Any], arguments: Callable[..., dict[str, Any]]) -> None:
    raises(ValueError, "backend cuda triton torch reference", function, **arguments(backend="cuda"))


def test_the_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LossConfig().clip_low = 0.3
    with pytest.raises(TypeError):
        LossConfig(clip_range=0.2)


@pytest.mark.parametrize(
    "changes",
    [
        {"advantages": torch.ones(B)},
        {"advantages": pair()},
        {"config": LossConfig(reduction="seq-mean-token-mean")},
        {"config": LossConfig(reduction="seq-mean-token-sum")},
        {"config": LossConfig(reduction="constant", max_length=4)},
        {"config": LossConfig(reduction="group-token-mean"), "group_ids": torch.zeros(B, dtype=torch.int64)},
        {"config": LossConfig(ratio_level="sequence"), "old_logps": torch.zeros(N)},
    ],
)
def test_per_response_data_for_packed_input_needs_cu_seqlens(changes: dict[str, Any]) -> None:
    raises(ValueError, "cu_seqlens", linear_prefix_loss, **linear("packed", **changes))
    linear_prefix_loss(**linear("packed", **changes, cu_seqlens=torch.tensor([0, 3, 6])))


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ([0, 4, 3, 6], "cu_seqlens increas"),
        ([0, 3, 5], "cu_seqlens 5 6"),
        ([0, 3, 9], "cu_seqlens 9 6"),
        ([1, 3, 6], "cu_seqlens 1 0"),
        ([[0, 3, 6]], "cu_seqlens"),
        ([], "cu_seqlens"),
    ],
)
def test_cu_seqlens_that_do_not_tile_the_tokens(bounds: list[Any], words: str) -> None:
    cu = torch.tensor(bounds, dtype=torch.int64)
    raises(ValueError, words, linear_prefix_loss, **linear("packed", cu_seqlens=cu))


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
@pytest.mark.parametrize("coefficient", [0.0, 0.1])
def test_sampled_kl_needs_ref_logps(name: str, coefficient: float) -> None:
    config = LossConfig(kl=name, kl_coef=coefficient)
    raises(ValueError, f"kl {name} ref_logps", linear_prefix_loss, **linear(config=config))
    raises(ValueError, f"kl {name} ref_logps", prefix_loss, **from_logits(config=config))


def test_full_kl_needs_the_reference_s_distribution() -> None:
    config = LossConfig(kl="full", kl_coef=0.1)
    hidden, weight, logps = torch.randn(B, T, D), torch.randn(V, D), torch.zeros(B, T)
    raises(ValueError, "kl full ref_hidden", linear_prefix_loss, **linear(config=config))
    raises(ValueError, "kl full ref_hidden", linear_prefix_loss, **linear(config=config, ref_logps=logps))
    raises(ValueError, "ref_lm_head_weight", linear_prefix_loss, **linear(config=config, ref_hidden=hidden))
    raises(ValueError, "ref_hidden", linear_prefix_loss, **linear(config=config, ref_lm_head_weight=weight))
    raises(ValueError, "kl full ref_logits", prefix_loss, **from_logits(config=config))


def test_kl_coef_without_a_kl_only_warns() -> None:
    with pytest.warns(UserWarning, match="kl_coef"):
        linear_prefix_loss(**linear(), config=LossConfig(kl_coef=0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear_prefix_loss(**linear(), config=LossConfig())


@pytest.mark.parametrize("name", ["tis", "icepop"])
def test_sampler_correction_needs_sampler_logps(name: str) -> None:
    raises(ValueError, "sampler_logps", linear_prefix_loss, **linear(config=LossConfig(sampler_correction=name)))


def test_group_token_mean_needs_group_ids() -> None:
    raises(
        ValueError,
        "group_ids group-token-mean",
        linear_prefix_loss,
        **linear(config=LossConfig(reduction="group-token-mean")),
    )


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("tokens float32 int64", {"tokens": torch.zeros(B, T)}),
        ("hidden int64", {"hidden": torch.zeros(B, T, D, dtype=torch.int64)}),
        ("lm_head_weight int64", {"lm_head_weight": torch.zeros(V, D, dtype=torch.int64)}),
        ("advantages int64", {"advantages": torch.ones(B, T, dtype=torch.int64)}),
        ("old_logps int64", {"old_logps": torch.ones(B, T, dtype=torch.int64)}),
        (
            "group_ids float32",
            {"group_ids": torch.zeros(B), "config": LossConfig(reduction="group-token-mean")},
        ),
        (
            "prefix_lengths float32",
            {"advantages": TokenAdvantages(torch.ones(B), torch.ones(B), torch.ones(B))},
        ),
    ],
)
def test_wrong_dtypes(words: str, changes: dict[str, Any]) -> None:
    raises(TypeError, words, linear_prefix_loss, **linear(**changes))


def test_wrong_dtypes_of_the_other_inputs() -> None:
    raises(TypeError, "logits int64", prefix_loss, **from_logits(logits=torch.zeros(B, T, V, dtype=torch.int64)))
    raises(TypeError, "tokens float32 int64", prefix_loss, **from_logits(tokens=torch.zeros(B, T)))
    raises(
        TypeError,
        "cu_seqlens float32",
        linear_prefix_loss,
        **linear("packed", cu_seqlens=torch.tensor([0.0, 3.0, 6.0])),
    )
    arguments = linear(tokens=torch.zeros(B, T))
    del arguments["advantages"]
    raises(TypeError, "tokens float32 int64", linear_logps, **arguments)


@pytest.mark.parametrize("function", [linear_prefix_loss, prefix_loss])
def test_triton_in_float64_says_why_and_what_to_use(function: Callable[..., Any]) -> None:
    make = linear if function is linear_prefix_loss else from_logits
    arguments = {name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
                 for name, x in make(backend="triton").items()}  # fmt: skip
    raises(RuntimeError, "triton float64 torch", function, **arguments)


def test_triton_on_the_cpu_says_why_and_what_to_use() -> None:
    """In a process of its own: whether kernels are interpreted is settled at import."""
    program = (
        "import torch, prefixloss\n"
        "x, ids, a = torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.int64), torch.ones(1)\n"
        "prefixloss.prefix_loss(x, ids, a, backend='triton')\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode != 0
    said = run.stderr.splitlines()[-1]
    assert said.startswith("RuntimeError")
    for word in ("triton", "cpu", "torch"):
        assert word in said


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("bad", [-1, V, 10**9])
def test_token_ids_outside_the_vocabulary_are_refused_on_the_cpu(backend: str, bad: int) -> None:
    tokens = torch.zeros(B, T, dtype=torch.int64)
    tokens[1, 2] = bad
    for function, arguments in (
        (linear_prefix_loss, linear(tokens=tokens, backend=backend)),
        (prefix_loss, from_logits(tokens=tokens, backend=backend)),
    ):
        with pytest.raises((ValueError, IndexError), match=rf"(?s)tokens.*{bad}"):
            function(**arguments)


# Advantages


def vppo_arguments(**changes: Any) -> dict[str, Any]:
    base = {
        "correct": torch.tensor([True, False]),
        "lengths": torch.tensor([4, 6]),
        "first_error": torch.tensor([-1, 3]),
        "group_ids": torch.tensor([0, 0]),
        "shorten": 1,
    }
    return base | changes


@pytest.mark.parametrize("function", [advantages.vppo, advantages.cliff])
@pytest.mark.parametrize(
    ("kind", "words", "changes"),
    [
        (ValueError, "first_error 7 6", {"first_error": torch.tensor([-1, 7])}),
        (ValueError, "first_error -2", {"first_error": torch.tensor([-1, -2])}),
        (ValueError, "group_ids", {"group_ids": torch.tensor([0, 0, 0])}),
        (ValueError, "lengths", {"lengths": torch.tensor([4, 6, 8])}),
        (ValueError, "first_error", {"first_error": torch.tensor([-1])}),
        (TypeError, "lengths float32", {"lengths": torch.tensor([4.0, 6.0])}),
        (TypeError, "first_error float32", {"first_error": torch.tensor([-1.0, 3.0])}),
        (TypeError, "group_ids float32", {"group_ids": torch.tensor([0.0, 0.0])}),
        (TypeError, "correct float32", {"correct": torch.tensor([1.0, 0.0])}),
    ],
)
def test_advantages_refuse_wrong_input(
    function: Callable[..., Any], kind: type[Exception], words: str, changes: dict[str, Any]
) -> None:
    arguments = vppo_arguments(**changes)
    if function is advantages.cliff:
        del arguments["shorten"]
    raises(kind, words, function, **arguments)


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("prompt_lengths", {"shorten": "prompt"}),
        ("shorten step prompt", {"shorten": "step"}),
        ("shorten -1", {"shorten": -1}),
        ("shorten 1.5", {"shorten": 1.5}),
        ("shorten -0.5", {"shorten": -0.5}),
        ("alpha -1", {"alpha": -1.0}),
        ("prompt_lengths", {"shorten": "prompt", "prompt_lengths": torch.tensor([1])}),
    ],
)
def test_vppo_refuses_wrong_options(words: str, changes: dict[str, Any]) -> None:
    advantages.vppo(**vppo_arguments())
    raises(ValueError, words, advantages.vppo, **vppo_arguments(**changes))


def test_siblings_refuse_shapes_that_do_not_fit() -> None:
    two, three = torch.tensor([1.0, 0.0]), torch.tensor([0, 0, 0])
    raises(ValueError, "group_ids", advantages.grpo, rewards=two, group_ids=three)
    raises(
        ValueError,
        "mean_step_scores",
        advantages.mixed,
        rewards=two,
        mean_step_scores=torch.ones(3),
        group_ids=torch.tensor([0, 0]),
    )
    raises(
        ValueError,
        "first_error",
        advantages.neutral_prefix,
        response_advantages=two,
        correct=torch.tensor([True, False]),
        first_error=torch.tensor([-1]),
    )
    raises(
        ValueError,
        "total_steps",
        advantages.rts,
        correct=torch.tensor([True, False]),
        right_steps=torch.tensor([1, 1]),
        total_steps=torch.tensor([2]),
        group_ids=torch.tensor([0, 0]),
    )
