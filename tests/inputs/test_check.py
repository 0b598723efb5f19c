"""Whatever is thrown at an argument, the error is a ValueError or TypeError that names it. A table of bad values for
each kind of argument meets every argument of every public function."""

import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from prefixloss import LossConfig, TokenAdvantages, advantages, check, linear_logps, linear_prefix_loss, prefix_loss
from prefixloss.parallel import global_normalizer

B, T, D, V = 2, 3, 4, 5
NAN, INF = math.nan, math.inf
# on a GPU the kernels take no CPU tensors
BACKENDS = ("torch", "reference") if torch.cuda.is_available() else ("torch", "reference", "triton")


# Bad values, by the kind of argument


def no_tensors() -> dict[str, Any]:
    return {"a list": [1.0, 2.0], "an array": np.zeros(2), "a string": "x", "a number": 1.0, "an object": object()}


def tensors_without_numbers(right: Tensor) -> Iterator[tuple[str, Any]]:
    """Tensors of the right shape, and the right dtype where that can be, that kernels cannot read."""
    yield "nested", torch.nested.nested_tensor([right.reshape(-1), right.reshape(-1)[:1]])
    yield "jagged", torch.nested.nested_tensor([right.reshape(-1), right.reshape(-1)[:1]], layout=torch.jagged)
    yield "sparse", right.to_sparse()
    if right.dim() == 2:
        yield "sparse rows", right.to_sparse_csr()
    yield "meta", right.to("meta")
    with FakeTensorMode() as mode:
        yield "fake", mode.from_tensor(right)
    yield "complex", right.to(torch.complex64)
    if right.is_floating_point():
        yield "mkldnn", right.to_mkldnn()
        yield "quantized", torch.quantize_per_tensor(right, 0.1, 0, torch.qint8)
        yield "negative bit", torch.complex(right, right).conj().imag


def numbers(more: dict[str, Any]) -> dict[str, Any]:
    return {
        "a string": "0.5", "None": None, "nan": NAN, "inf": INF, "a bool": True, "a NumPy bool": np.True_,
        "a Decimal": Decimal("0.5"), "huge": 10**400, "beyond writing": 10**5000, "a huge fraction": Fraction(10**400),
        "beyond float32": 1e300, "subnormal": 1e-320, "a small inf": np.float16(INF),
        "a tensor": torch.tensor(0.5), "an array": np.array([0.5, 0.5]),
        "complex": 1j, "a list": [0.5], "an object": object(),
    } | more  # fmt: skip


WHOLE = {
    "a string": "4", "a fraction": 1.5, "a bool": True, "nan": NAN, "inf": INF, "huge": 10**30, "huger": 10**5000,
    "negative": -1, "a tensor": torch.tensor(2), "an array": np.array([2, 3]), "a Decimal": Decimal(2), "a list": [2],
}  # fmt: skip
FLAGS = {
    "a string": "no", "None": None, "a number": 1, "a NumPy bool": np.True_, "a tensor": torch.tensor(True), "list": [],
}  # fmt: skip
NAMES = {
    "unknown": "x" * 5000, "bytes": b"clip", "a number": 1, "a list": ["clip"], "an array": np.array(["a", "b"]),
    "a tensor": torch.zeros(2), "an object": object(),
}  # fmt: skip
PAIRS = {
    "None": None, "a number": 1.0, "three": (1.0, 1.0, 1.0), "strings": ("1", "2"), "nan": (1.0, NAN),
    "bools": (True, 2.0),
    "inf first": (INF, INF), "huge": (10**400, 10**401), "beyond float32": (1.0, 1e300),
    "a tensor": torch.ones(2),
    "negative": (-1.0, 2.0), "a string": "12", "None inside": (None, 1.0),
}  # fmt: skip
GROUPS = {"a number": 1, "a string": "world", "a list": [0, 1]}
NORMALIZERS = {
    "a string": "2", "a bool": True, "nan": NAN, "inf": INF, "zero": 0.0, "negative": -1.0, "beyond float32": 1e300,
    "subnormal": 1e-320, "huge": 10**400, "a Decimal": Decimal(2), "a list": [2.0], "a vector": torch.ones(2),
    "a bool tensor": torch.tensor(True), "a complex tensor": torch.tensor(1j),
    "a meta tensor": torch.ones((), device="meta"), "a sparse tensor": torch.ones(1).to_sparse(),
    "a large tensor": torch.tensor(1e300, dtype=torch.float64), "a NaN tensor": torch.tensor(NAN),
}  # fmt: skip
SHORTENS = numbers({"a number": 1.5, "negative": -1, "a huge whole number": 10**30, "another name": "prompts"})
SHARES = numbers({"negative": -0.1, "above 1": 1.1})


def bad_tensors(right: Tensor, optional: bool) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of nested and quantised prototypes
        made = no_tensors() | dict(tensors_without_numbers(right))
    wrong = right.long() if right.is_floating_point() else right.double()
    more = {} if optional else {"None": None}
    return (
        made
        | more
        | ({} if right.dtype == torch.bool else {"another dtype": wrong})
        | {"another shape": right[None, None]}
    )


# The functions: a right call of each, and what each argument is


def loss_arguments() -> dict[str, Any]:
    return {
        "hidden": torch.randn(B, T, D), "lm_head_weight": torch.randn(V, D), "lm_head_bias": torch.randn(V),
        "tokens": torch.zeros(B, T, dtype=torch.int64), "advantages": torch.ones(B, T),
        "mask": torch.ones(B, T, dtype=torch.bool), "old_logps": torch.zeros(B, T), "sampler_logps": torch.zeros(B, T),
        "ref_logps": torch.zeros(B, T), "ref_hidden": torch.randn(B, T, D), "ref_lm_head_weight": torch.randn(V, D),
        "ref_lm_head_bias": torch.randn(V), "group_ids": torch.zeros(B, dtype=torch.int64), "normalizer": 2.0,
        "config": LossConfig(kl="full", kl_coef=0.1), "backend": "torch", "tp_group": None, "cp_group": None,
        "max_learning_tokens": 10, "vocab_size": V,
    }  # fmt: skip


def logit_arguments() -> dict[str, Any]:
    right = loss_arguments()
    for name in tuple(right):
        if name.startswith(("hidden", "lm_head", "ref_hidden", "ref_lm_head", "max_")):
            del right[name]
    return right | {"logits": torch.randn(B, T, V), "ref_logits": torch.randn(B, T, V), "inplace": False}


def logp_arguments() -> dict[str, Any]:
    kept = ("hidden", "lm_head_weight", "lm_head_bias", "tokens", "mask", "backend", "tp_group", "vocab_size")
    more = {"temperature": 1.0, "softcap": 30.0, "logit_scale": 1.0, "entropy": True, "max_scored_tokens": 10}
    more |= {"chunk_tokens": None, "gradient_tolerance": 0.0, "head_gradient_tolerance": 0.0}
    return {name: value for name, value in loss_arguments().items() if name in kept} | more


def response_arguments(*names: str, **options: Any) -> dict[str, Any]:
    every = {
        "correct": torch.tensor([True, False]), "lengths": torch.tensor([4, 6]), "first_error": torch.tensor([-1, 3]),
        "group_ids": torch.tensor([0, 0]), "rewards": torch.tensor([1.0, 0.0]), "prompt_lengths": torch.tensor([2, 2]),
        "right_steps": torch.tensor([2, 1]), "total_steps": torch.tensor([2, 3]),
        "mean_step_scores": torch.tensor([0.5, 0.1]), "response_advantages": torch.tensor([1.0, -1.0]),
        "judged": torch.tensor([True, True]),
    }  # fmt: skip
    return {name: every[name] for name in (*names, "judged")} | options


OPTIONAL = {
    "mask", "old_logps", "sampler_logps", "ref_logps", "lm_head_bias", "ref_lm_head_bias", "group_ids of a loss",
    "judged", "cu_seqlens", "ref_hidden of None", "softcap", "ratio_cap", "dual_clip", "max_length", "chunk_tokens",
    "sampler_missing", "off_policy_mask_threshold", "kl_clamp", "flawed",
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "normalizer": NORMALIZERS, "config": NAMES | {"None": None, "a dict": {}}, "backend": NAMES | {"None": None},
    "tp_group": GROUPS, "cp_group": GROUPS, "group": GROUPS,
    **dict.fromkeys(("max_learning_tokens", "max_scored_tokens", "vocab_size", "max_length", "chunk_tokens"), WHOLE),
    **dict.fromkeys(("inplace", "entropy", "relu", "std", "averaged", "kl_importance"), FLAGS),
    "temperature": numbers({"zero": 0.0, "negative": -1.0}), "logit_scale": numbers({"zero": 0.0, "negative": -1.0}),
    **dict.fromkeys(("softcap", "ratio_cap", "kl_clamp"), numbers({"zero": 0.0, "negative": -1.0})),
    "dual_clip": numbers({"one": 1.0}), "alpha": SHARES, "flawed": SHARES, "weight": SHARES, "shorten": SHORTENS,
    **dict.fromkeys(("keep", "beta", "gamma", "kl_coef", "entropy_coef"), numbers({})),
    **dict.fromkeys(("clip_low", "clip_high", "divergence_cap", "row_tolerance"), numbers({"negative": -0.1})),
    **dict.fromkeys(("off_policy_mask_threshold", "std_floor"), numbers({"negative": -0.1})),
    **dict.fromkeys(("cov_share", "top_entropy_quantile"), numbers({"zero": 0.0, "more than all": 1.01})),
    "m2_threshold": numbers({"zero": 0.0}), "cov_kl_coef": numbers({"negative": -0.1}),
    "sampler_missing": WHOLE | {"two": 2, "negative": -1, "half": 0.5},
    **dict.fromkeys(("gradient_tolerance", "head_gradient_tolerance"), numbers({"negative": -0.1, "a name": "all"})),
    **dict.fromkeys(("sapo_tau", "sampler_bounds", "vespo_positive", "vespo_other", "cov_bounds"), PAIRS),
    **dict.fromkeys(("objective", "ratio_level", "reduction", "stats", "sampler_correction", "kl"), NAMES),
}  # fmt: skip
CALLS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "linear_prefix_loss": (linear_prefix_loss, loss_arguments),
    "prefix_loss": (prefix_loss, logit_arguments),
    "linear_logps": (linear_logps, logp_arguments),
    "vppo": (
        advantages.vppo,
        lambda: response_arguments(
            "correct", "lengths", "first_error", "group_ids", "prompt_lengths",
            alpha=0.5, shorten="prompt", relu=False, std=False, std_floor=0.0, flawed=0.5,
        ),
    ),
    "cliff": (
        advantages.cliff, lambda: response_arguments("correct", "lengths", "first_error", "group_ids", keep=0.0),
    ),
    "grpo": (advantages.grpo, lambda: response_arguments("rewards", "group_ids", std=True, std_floor=0.0)),
    "rloo": (advantages.rloo, lambda: response_arguments("rewards", "group_ids")),
    "opo": (advantages.opo, lambda: response_arguments("rewards", "lengths", "group_ids")),
    "reinforce_pp": (advantages.reinforce_pp, lambda: response_arguments("rewards", "lengths", std_floor=0.0)),
    "reinforce_pp_baseline": (
        advantages.reinforce_pp_baseline,
        lambda: response_arguments("rewards", "lengths", "group_ids", std_floor=0.0),
    ),
    "varied": (advantages.varied, lambda: response_arguments("rewards", "group_ids")),
    "neutral_prefix": (
        advantages.neutral_prefix, lambda: response_arguments("response_advantages", "correct", "first_error"),
    ),
    "rts": (
        advantages.rts,
        lambda: response_arguments(
            "correct", "right_steps", "total_steps", "group_ids", beta=-10.0, gamma=20.0, std=True, std_floor=0.0,
        ),
    ),
    "mixed": (
        advantages.mixed,
        lambda: response_arguments("rewards", "mean_step_scores", "group_ids", weight=0.8, std=True, std_floor=0.0),
    ),
    "LossConfig": (LossConfig, lambda: {f.name: getattr(LossConfig(), f.name) for f in fields(LossConfig)}),
}  # fmt: skip


def bad_values(argument: str, right: Any) -> dict[str, Any]:
    if argument in KINDS:
        optional = right is None or argument in OPTIONAL
        return {name: value for name, value in KINDS[argument].items() if value is not None or not optional}
    assert isinstance(right, Tensor), f"{argument}: add its kind to this file"
    bad = bad_tensors(right, optional=argument in OPTIONAL or argument == "group_ids")
    if argument == "rewards":
        del bad["another dtype"]  # numbers of any kind
    return bad


def refused(function: Callable[..., Any], arguments: dict[str, Any], argument: str, what: str) -> None:
    """The call is, with an error that begins with the argument's name, and short enough to be read."""
    try:
        function(**arguments)
    except Exception as error:  # whatever else there is fails below, where all is shown
        said = error
    else:
        raise AssertionError(f"{argument}, {what}: taken without a word")
    of_it = re.match(rf"(advantages\.)?{argument}: got ", str(said))
    if type(said) not in (ValueError, TypeError) or not of_it or len(str(said)) > 1000:
        raise AssertionError(f"{argument}, {what}: {said!r}") from said


CASES = [
    (name, argument, backend)
    for name, (_, right) in CALLS.items()
    for argument in right()
    for backend in (BACKENDS if "backend" in right() else ("none",))
    if (argument, backend) not in {("cp_group", "reference"), ("tp_group", "reference")}
    # split logits, and distillation, have no kernels
    if (argument, backend) != ("tp_group", "triton") or name in ("linear_prefix_loss", "linear_logps")
]


@pytest.mark.parametrize("name", CALLS)
def test_the_right_calls_are_right(name: str) -> None:
    """Or the table below would prove nothing."""
    function, right = CALLS[name]
    function(**right())


@pytest.mark.parametrize("name", CALLS)
def test_no_argument_is_left_out_of_the_table(name: str) -> None:
    function, right = CALLS[name]
    elsewhere = {"cu_seqlens", "kept_ids", "kept_offsets"}  # below, and in test_kept
    assert set(inspect.signature(function).parameters) - elsewhere == set(right())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("function", "make"), [(linear_prefix_loss, loss_arguments), (prefix_loss, logit_arguments)])
def test_bad_offsets_are_refused_by_name(function: Callable[..., Any], make: Any, backend: str) -> None:
    right = {n: v.flatten(0, 1) if isinstance(v, Tensor) and v.shape[:2] == (B, T) else v for n, v in make().items()}
    right |= {"backend": backend, "cu_seqlens": torch.tensor([0, 3, 6], dtype=torch.int32)}
    function(**right)
    for what, bad in bad_tensors(right["cu_seqlens"], optional=True).items():
        refused(function, right | {"cu_seqlens": bad}, "cu_seqlens", what)


@pytest.mark.parametrize(("name", "argument", "backend"), CASES)
def test_bad_values_are_refused_by_name(name: str, argument: str, backend: str) -> None:
    function, right = CALLS[name]
    arguments = right() if backend == "none" else right() | {"backend": backend}
    for what, bad in bad_values(argument, arguments[argument]).items():
        refused(function, arguments | {argument: bad}, argument, what)


@pytest.mark.parametrize("field", TokenAdvantages._fields)
@pytest.mark.parametrize("backend", ["none", *BACKENDS])
def test_bad_fields_of_token_advantages_are_refused_by_name(field: str, backend: str) -> None:
    pair = TokenAdvantages(torch.ones(B), -torch.ones(B), torch.ones(B, dtype=torch.int64))
    right = loss_arguments() | {"config": LossConfig(), "backend": backend}

    def call(**changes: Any) -> None:
        given = pair._replace(**changes)
        if backend == "none":
            given.per_token(torch.zeros(B, T))
        else:
            linear_prefix_loss(**(right | {"advantages": given}))

    call()
    for what, bad in bad_tensors(getattr(pair, field), optional=False).items():
        refused(call, {field: bad}, field, what)


def test_bad_arguments_of_per_token_are_refused_by_name() -> None:
    pair = TokenAdvantages(torch.ones(B), -torch.ones(B), torch.ones(B, dtype=torch.int64))
    right: dict[str, Any] = {
        "like": torch.zeros(6), "mask": torch.ones(6), "cu_seqlens": torch.tensor([0, 3, 6]),
    }  # fmt: skip
    assert pair.per_token(**right).tolist() == [1.0, -1.0, -1.0] * 2
    for argument, value in right.items():
        bad = bad_tensors(value, optional=argument != "like")
        for name in ("another dtype", "complex") if argument == "like" else ():
            del bad[name]  # its shape is all that counts
        if argument == "mask":
            del bad["another dtype"]
        for what, one in bad.items():
            refused(pair.per_token, right | {argument: one}, argument, what)


@pytest.fixture
def one_process(tmp_path: Any) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_bad_arguments_of_global_normalizer_are_refused_by_name() -> None:
    right: dict[str, Any] = {
        "config": LossConfig(reduction="group-token-mean"), "tokens": torch.zeros(6, dtype=torch.int64),
        "mask": torch.ones(6), "cu_seqlens": torch.tensor([0, 3, 6]), "group_ids": torch.tensor([0, 1]),
        "group": None, "cp_group": None, "averaged": True,
    }  # fmt: skip
    assert global_normalizer(**right) == 2
    for argument, value in right.items():
        bad = bad_tensors(value, optional=argument in OPTIONAL) if isinstance(value, Tensor) else KINDS[argument]
        if argument == "mask":
            del bad["another dtype"]
        for what, one in bad.items():
            refused(global_normalizer, right | {argument: one}, argument, what)


def test_global_normalizer_without_processes_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match=r"group: got no process group.*init_process_group"):
        global_normalizer(LossConfig(), torch.zeros(2, dtype=torch.int64))


# Single values


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [0, D])
def test_hidden_states_have_a_width_and_a_vocabulary_a_word(backend: str, width: int) -> None:
    empty = {"hidden": torch.zeros(B, T, width), "lm_head_weight": torch.zeros(0 if width else V, width)}
    name = "lm_head_weight" if width else "hidden"
    for function, right in ((linear_prefix_loss, loss_arguments()), (linear_logps, logp_arguments())):
        refused(function, right | empty | {"backend": backend}, name, f"D = {width}")


@pytest.mark.parametrize(("responses", "length"), [(0, T), (B, 0)])
def test_no_response_and_no_token_at_all_are_taken(responses: int, length: int) -> None:
    empty = {
        "hidden": torch.zeros(responses, length, D),
        "tokens": torch.zeros(responses, length, dtype=torch.int64),
        "advantages": torch.zeros(responses),
    }
    assert linear_prefix_loss(**empty, lm_head_weight=torch.zeros(V, D)).loss == 0


@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(0.5), np.float16(0.5), Fraction(1, 2), 0.5])
def test_numbers_of_numpy_and_fractions_are_numbers(value: Any) -> None:
    config = LossConfig(clip_low=value, clip_high=np.int8(1), max_length=np.int32(7), sapo_tau=[value, np.int64(2)])
    assert config == LossConfig(clip_low=0.5, clip_high=1, max_length=7, sapo_tau=(0.5, 2))
    assert hash(config)
    assert LossConfig.decoded(config.encoded) == config  # what a compiled call sees
    arguments = response_arguments("correct", "lengths", "first_error", "group_ids", alpha=value)
    want = advantages.vppo(**arguments | {"alpha": 0.5}, shorten=0.5)
    got = advantages.vppo(**arguments, shorten=value)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert linear_prefix_loss(**loss_arguments() | {"normalizer": value}).loss.isfinite()


@pytest.mark.parametrize(
    "value", [3.4e38, 1.2e-38, 2**100, torch.tensor(3, dtype=torch.int32), torch.tensor(2.0).half()]
)
def test_normalizers_within_float32_are_taken(value: Any) -> None:
    assert linear_prefix_loss(**loss_arguments() | {"normalizer": value}).loss.isfinite()


# Values of tokens


def with_logps(name: str, value: float, at: tuple[int, int], **changes: Any) -> dict[str, Any]:
    right = loss_arguments() | {"config": LossConfig(kl="k3", kl_coef=0.1, sampler_correction="tis")} | changes
    right[name] = right[name].clone()
    right[name][at] = value
    return right


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("name", ["old_logps", "sampler_logps", "ref_logps", "advantages"])
def test_infinite_and_nan_values_of_scored_tokens_are_refused_by_place(backend: str, name: str, value: float) -> None:
    right = with_logps(name, value, (1, 2), backend=backend)
    with pytest.raises(ValueError, match=rf"{name}: got {value} at response 1, position 2, expected finite"):
        linear_prefix_loss(**right)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, 2] = False
    want = linear_prefix_loss(**loss_arguments() | {**right, "mask": mask, name: loss_arguments()[name]}).loss
    assert torch.equal(linear_prefix_loss(**right | {"mask": mask}).loss, want)  # never looked at


def test_values_beyond_float32_are_infinite_to_a_float32_loss() -> None:
    right = with_logps("old_logps", -1e300, (0, 1), old_logps=torch.zeros(B, T, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"old_logps: got -inf at response 0, position 1"):
        linear_prefix_loss(**right)


def test_a_place_is_of_a_packed_response_where_there_are_any() -> None:
    right = with_logps("old_logps", NAN, (1, 2))
    packed = {n: v.flatten(0, 1) if isinstance(v, Tensor) and v.shape[:2] == (B, T) else v for n, v in right.items()}
    with pytest.raises(ValueError, match="old_logps: got nan at position 5,"):
        linear_prefix_loss(**packed | {"group_ids": None})
    with pytest.raises(ValueError, match="old_logps: got nan at response 2, position 1,"):
        linear_prefix_loss(**packed | {"cu_seqlens": torch.tensor([0, 1, 4, 6]), "group_ids": None})


def test_a_small_positive_log_prob_is_rounding() -> None:
    assert linear_prefix_loss(**with_logps("old_logps", 1e-6, (1, 2))).loss.isfinite()


@pytest.mark.parametrize("name", ["old_logps", "advantages", "prefix_lengths"])
def test_values_are_not_looked_at_where_that_would_wait(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = TokenAdvantages(torch.ones(B), -torch.ones(B), torch.full((B,), T + 1))
    right = with_logps(name, NAN, (1, 2)) if name != "prefix_lengths" else loss_arguments() | {"advantages": pair}
    right["config"] = LossConfig()
    with pytest.raises(ValueError, match=name):
        linear_prefix_loss(**right)
    monkeypatch.setattr(check, "readable", lambda _: False)  # as on a GPU without PREFIXLOSS_CHECK
    loss = linear_prefix_loss(**right).loss
    assert loss.isfinite() if name == "prefix_lengths" else loss.isnan()  # never a number that looks right


def test_a_prefix_ends_within_the_scored_tokens() -> None:
    mask = torch.tensor([[True, False, True], [False, True, True]])
    pair = TokenAdvantages(torch.ones(B), -torch.ones(B), torch.tensor([2, 2]))
    assert pair.per_token(mask, mask).tolist() == [[1, 0, 1], [0, 1, 1]]
    for length, wants in ((3, "no more than its scored tokens, 2"), (2**62, "no more"), (-1, "0 or more")):
        beyond = pair._replace(prefix_lengths=torch.tensor([2, length]))
        words = rf"advantages.prefix_lengths: got {length} for response 1, expected {wants}"
        with pytest.raises(ValueError, match=words):
            beyond.per_token(mask, mask)
        with pytest.raises(ValueError, match=words):
            linear_prefix_loss(**loss_arguments() | {"advantages": beyond, "mask": mask})


def test_a_response_that_is_masked_altogether_has_no_prefix_to_check() -> None:
    mask = torch.tensor([[True, False, True], [False, False, False]])
    pair = TokenAdvantages(torch.ones(B), torch.tensor([-1.0, NAN]), torch.tensor([1, 9]))
    assert pair.per_token(mask, mask).tolist() == [[1, 0, -1], [0, 0, 0]]
    linear_prefix_loss(**loss_arguments() | {"advantages": pair, "mask": mask})
