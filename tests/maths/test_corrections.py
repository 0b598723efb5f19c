"""Weights and masks for a sampler that is not the policy, and the clamp of a KL: by hand, and against the oracle."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import call_with_grads, packed, small_case, solve_with_grads, without_ref

from prefixloss import LossConfig, prefix_loss

HALF = math.log(0.5)
NAN = math.nan
# By hand, two tokens of probability 1/2 in a response: the options, log q of each (NaN: no sampler's log-prob),
# advantages, and their losses by "reinforce", which are weight * A * log 2.
VECTORS: list[tuple[dict[str, Any], list[float], list[float], list[float]]] = [
    ({"sampler_correction": "tis", "sampler_bounds": (0.5, 2.0)}, [math.log(4), math.log(0.25)], [1, 1], [2, 0.25]),
    (
        {"sampler_correction": "token_truncate", "sampler_bounds": (0.5, 2.0)},
        [math.log(4), math.log(0.25)],
        [1, 1],
        [2, 0.5],
    ),
    # 4 * 0.25 = 1, and 4 * 2 = 8
    ({"sampler_correction": "sequence_truncate"}, [math.log(4), math.log(0.25)], [1, -1], [1, -1]),
    ({"sampler_correction": "sequence_truncate"}, [math.log(4), math.log(2)], [1, 3], [2, 6]),
    ({"sampler_correction": "sequence_truncate", "sampler_bounds": (0.5, 2)}, [-3.0, 0.0], [1, 1], [0.5, 0.5]),
    ({"sampler_correction": "sequence_mask", "sampler_bounds": (0, 8.1)}, [math.log(4), math.log(2)], [1, 1], [8, 8]),
    ({"sampler_correction": "sequence_mask", "sampler_bounds": (0, 7.9)}, [math.log(4), math.log(2)], [1, 1], [0, 0]),
    # the geometric mean of 4 and 1 is 2
    ({"sampler_correction": "geometric_truncate", "sampler_bounds": (0, 3)}, [math.log(4), 0.0], [1, 1], [2, 2]),
    ({"sampler_correction": "geometric_truncate", "sampler_bounds": (0, 1.5)}, [math.log(4), 0.0], [1, 1], [1.5, 1.5]),
    ({"sampler_correction": "geometric_mask", "sampler_bounds": (0, 1.9)}, [math.log(4), 0.0], [1, 1], [0, 0]),
    ({"sampler_correction": "geometric_mask", "sampler_bounds": (0, 2.1)}, [math.log(4), 0.0], [1, 1], [2, 2]),
    # nobody knows the second
    ({"sampler_correction": "tis", "sampler_missing": 1}, [math.log(1.5), NAN], [1, 1], [1.5, 1]),
    ({"sampler_correction": "tis", "sampler_missing": 0}, [math.log(1.5), NAN], [1, 1], [1.5, 0]),
    ({"sampler_correction": "sequence_mask", "sampler_missing": 1}, [math.log(1.5), NAN], [1, 1], [1.5, 1.5]),
    ({"sampler_correction": "sequence_mask", "sampler_missing": 0}, [math.log(1.5), NAN], [1, 1], [1.5, 0]),
    # sampler_logp - logp = -log q, its mean 0.3: only what is to become rarer is left out
    ({"off_policy_mask_threshold": 0.29}, [-0.5, -0.1], [1, -1], [1, 0]),
    ({"off_policy_mask_threshold": 0.31}, [-0.5, -0.1], [1, -1], [1, -1]),
    ({"off_policy_mask_threshold": 0.2, "sampler_missing": 1}, [-0.5, NAN], [1, -1], [1, 0]),
    ({"off_policy_mask_threshold": 0.3, "sampler_missing": 1}, [-0.5, NAN], [1, -1], [1, -1]),
]


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize(("options", "log_q", "advantages", "losses"), VECTORS, ids=str)
def test_numbers_by_hand(
    options: dict[str, Any], log_q: list[float], advantages: list[float], losses: list[float], backend: str
) -> None:
    logits = torch.zeros(1, 2, 2, requires_grad=True)
    config = LossConfig(objective="reinforce", reduction="none", **options)
    out = prefix_loss(
        logits, torch.zeros(1, 2).long(), torch.tensor([advantages]).float(), config=config, backend=backend,
        old_logps=torch.full((1, 2), HALF), sampler_logps=HALF - torch.tensor([log_q]),
    )  # fmt: skip
    want = torch.tensor([losses]) * math.log(2)
    torch.testing.assert_close(out.loss, want, rtol=1e-5, atol=1e-6)
    out.loss.sum().backward()
    # d logp / d its logit = 1 / 2
    torch.testing.assert_close(logits.grad[..., 0], -torch.tensor([losses]).float() / 2, rtol=1e-5, atol=1e-6)


GRID: list[dict[str, Any]] = [
    *({"sampler_correction": name, "sampler_bounds": (0.7, 1.4)} for name in ("token_truncate", "sequence_truncate")),
    {"sampler_correction": "sequence_mask", "sampler_bounds": (0.3, 3.0), "stats": "scored"},
    {"sampler_correction": "geometric_truncate", "sampler_bounds": (0.9, 1.1), "objective": "topr"},
    {"sampler_correction": "geometric_mask", "sampler_bounds": (0.8, 1.3), "reduction": "none", "kl": "k3"},
    {"sampler_correction": "sequence_truncate", "ratio_level": "sequence", "sampler_missing": 1},
    {"sampler_correction": "icepop", "sampler_missing": 0, "sampler_bounds": (0.5, 1.5)},
    {"off_policy_mask_threshold": 0.02, "objective": "gmpo"},
    {"off_policy_mask_threshold": 0.07, "sampler_correction": "tis", "entropy_coef": 0.1},
    {"kl": "k3", "kl_clamp": 0.23, "kl_coef": 0.3, "kl_importance": True},
    {"kl": "k2", "kl_clamp": 0.1, "kl_coef": 0.3},
]


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("level", ["linear", "logits"])
@pytest.mark.parametrize("options", GRID, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), [("reference", None), ("torch", None), ("triton", torch.float32)])
def test_every_back_end_agrees_with_the_oracle(
    backend: str, dtype: Any, options: dict[str, Any], level: str, layout: str
) -> None:
    case = without_ref(small_case(level, **{"kl_coef": 0.2 if "kl" in options else 0.0, **options}))
    if "kl" in options:
        case.ref_logps = case.old_logps + 0.1
    case.advantages[0] = 0
    case.advantages[1, 1] = 0
    if options.get("sampler_missing") is not None:
        case.sampler_logps[1, 0] = NAN
    case = packed(case) if layout == "packed" else case
    want, want_grads = solve_with_grads(case)
    got, grads = call_with_grads(case, backend, dtype=dtype)
    near = {"rtol": 1e-9, "atol": 1e-11} if dtype is None else {"rtol": 2e-4, "atol": 2e-5}
    torch.testing.assert_close(got.loss.double(), want.loss.detach().reshape(got.loss.shape), **near)
    assert torch.equal(got.learning.reshape(-1), want.learning)
    for name, grad in grads.items():
        torch.testing.assert_close(grad.double(), want_grads[name], **near)


def test_a_missing_log_prob_is_an_error_unless_it_is_said_what_it_means() -> None:
    case = without_ref(small_case("logits", sampler_correction="tis"))
    case.sampler_logps[1, 0] = NAN
    with pytest.raises(ValueError, match=r"^sampler_logps: got nan at response 1, position 0"):
        call_with_grads(case, "torch")
    case.sampler_logps[1, 0] = math.inf
    with pytest.raises(ValueError, match=r"^sampler_logps: got inf at response 1, position 0"):
        call_with_grads(case, "torch", sampler_missing=1)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"sampler_correction": "sequence_mask"}, 'sampler_correction="sequence_mask"'),
        ({"off_policy_mask_threshold": 1.0}, "off_policy_mask_threshold"),
    ],
)
def test_what_is_of_a_response_needs_responses(options: dict[str, Any], name: str) -> None:
    case = packed(without_ref(small_case("logits", **options))).but(cu_seqlens=None, group_ids=None)
    with pytest.raises(ValueError, match=f"^{name}: is per response, got packed input without cu_seqlens"):
        call_with_grads(case, "torch")


def test_an_exact_kl_has_no_clamp() -> None:
    with pytest.raises(ValueError, match=r"^kl_clamp: got 0\.1 with kl=\"full\""):
        LossConfig(kl="full", kl_clamp=0.1)
