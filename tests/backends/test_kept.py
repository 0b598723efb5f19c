"""Sampling replay: the distribution over the kept ids, from their columns alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import Counter, small_case, solve_with_grads
from torch import Tensor

from prefixloss import LossConfig, linear_logps, linear_prefix_loss, prefix_loss
from prefixloss.backends import memory, sparse
from prefixloss.backends.torch import kept as kept_columns

VOCABULARY, KEPT = 9, 4
OPTIONS: list[dict[str, Any]] = [
    {},
    {"kl": "full", "kl_coef": 0.3, "entropy_coef": 0.1, "softcap": 3.0, "temperature": 0.7},
    {"reduction": "none", "kl": "k3", "kl_coef": 0.2, "objective": "sapo"},
    {"ratio_level": "sequence", "reduction": "seq-mean-token-mean", "stats": "scored"},
]


# what looking a column up costs: less than nothing, or more than any product
WAYS = {"looked up": -1, "multiplied": 10**6}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(kept_columns, "_LOOKED_UP", WAYS[request.param])
    return request.param


def kept_of(tokens: Tensor, least: int = 1) -> Tensor:
    """[.., KEPT]: the token itself and others, in any order, some places unused."""
    gen = torch.Generator().manual_seed(3)
    rows = []
    for token in tokens.reshape(-1).tolist():
        others = [i for i in torch.randperm(VOCABULARY, generator=gen).tolist() if i != token]
        used = int(torch.randint(least, KEPT + 1, (), generator=gen))
        row = [token, *others[: used - 1], *[-1] * (KEPT - used)]
        rows.append([row[i] for i in torch.randperm(KEPT, generator=gen)])
    return torch.tensor(rows).reshape(*tokens.shape, KEPT)


def packed_sets(kept: Tensor) -> dict[str, Tensor]:
    used = [row[row >= 0] for row in kept.reshape(-1, kept.shape[-1])]
    ends = torch.tensor([0, *(len(row) for row in used)]).cumsum(0)
    return {"kept_ids": torch.cat(used), "kept_offsets": ends}


def banned_by(kept: Tensor) -> Tensor:
    """bool [.., VOCABULARY]: what is not kept."""
    banned = torch.ones(*kept.shape[:-1], VOCABULARY + 1, dtype=torch.bool)
    return banned.scatter(-1, torch.where(kept < 0, VOCABULARY, kept), False)[..., :-1]


def call(case: Any, backend: str, dtype: torch.dtype, sets: dict[str, Tensor]) -> tuple[Any, list[Tensor]]:
    names = ["hidden", "weight", "bias"] if case.logits is None else ["logits"]
    leaves = [getattr(case, name).detach().to(dtype).clone().requires_grad_() for name in names]
    shared: dict[str, Any] = {"mask": case.mask, "config": LossConfig(**case.options), "backend": backend, **sets}
    for name in ("old_logps", "ref_logps"):
        shared[name] = getattr(case, name).to(dtype)
    like = lambda x: None if x is None else x.to(dtype)
    if case.logits is not None:
        out = prefix_loss(leaves[0], case.tokens, case.advantages, ref_logits=like(case.ref_logits), **shared)
    else:
        out = linear_prefix_loss(
            leaves[0], leaves[1], case.tokens, case.advantages, lm_head_bias=leaves[2],
            ref_hidden=like(case.ref_hidden), ref_lm_head_weight=like(case.ref_weight), **shared,
        )  # fmt: skip
    out.loss.sum().backward()
    return out, [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("level", ["linear", "logits"])
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_it_is_the_loss_with_all_other_ids_banned(backend: str, level: str, form: str, options: Any) -> None:
    case = small_case(level, vocab=VOCABULARY, **options)
    case.sampler_logps = None
    kept = kept_of(case.tokens)
    banned = banned_by(kept)
    raw = case.logits if level == "logits" else case.hidden @ case.weight.t() + case.bias
    ref = case.ref_logits if level == "logits" else case.ref_hidden @ case.ref_weight.t()
    dense = case.but(
        hidden=None, weight=None, bias=None, ref_hidden=None, ref_weight=None,
        logits=raw.masked_fill(banned, -math.inf), ref_logits=ref.masked_fill(banned, -math.inf),
    )  # fmt: skip
    want, grads = solve_with_grads(dense)
    d_raw = grads["logits"].masked_fill(banned, 0.0)
    wanted = [d_raw]
    if level == "linear":
        flat = d_raw.reshape(-1, VOCABULARY)
        wanted = [d_raw @ case.weight, flat.t() @ case.hidden.reshape(len(flat), -1), flat.sum(0)]

    single = backend == "triton"
    sets = {"kept_ids": kept} if form == "padded" else packed_sets(kept)
    out, got = call(case, backend, torch.float32 if single else torch.float64, sets)
    near = {"rtol": 2e-4, "atol": 2e-5} if single else {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(out.loss.double(), want.loss.detach().reshape(out.loss.shape), **near)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, **near)
    shown = out.learning.reshape(-1)
    torch.testing.assert_close(out.logps.double().reshape(-1)[shown], want.logps.detach()[shown], **near)
    torch.testing.assert_close(out.entropy.double().reshape(-1)[shown], want.entropy.detach()[shown], **near)


@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_log_probs_and_entropies_are_of_the_kept_ids_too(backend: str, form: str) -> None:
    case = small_case("linear", vocab=VOCABULARY)
    kept = kept_of(case.tokens)
    banned = banned_by(kept)
    dtype = torch.float32 if backend == "triton" else torch.float64
    leaves = [x.detach().to(dtype).clone().requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    sets = {"kept_ids": kept} if form == "padded" else packed_sets(kept)
    got = linear_logps(
        leaves[0], leaves[1], case.tokens, mask=case.mask, lm_head_bias=leaves[2], temperature=0.7, softcap=3.0,
        entropy=True, backend=backend, **sets,
    )  # fmt: skip
    dense = [x.detach().clone().requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    scores = (3.0 * torch.tanh((dense[0] @ dense[1].T + dense[2]) / 3.0) / 0.7).masked_fill(banned, -math.inf)
    logp = scores.log_softmax(-1)
    want = logp.gather(-1, case.tokens[..., None])[..., 0], -(logp.exp() * logp.masked_fill(banned, 0.0)).sum(-1)
    near = {"rtol": 2e-4, "atol": 2e-5} if backend == "triton" else {"rtol": 1e-9, "atol": 1e-11}
    scale = torch.linspace(-1, 2, case.tokens.numel()).reshape(case.tokens.shape).double()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), torch.where(case.mask, b, 0.0), **near)
    sum(((x * scale).sum() for x in got), torch.zeros(())).backward()
    sum(((x * scale * case.mask).sum() for x in want), torch.zeros(())).backward()
    for a, b in zip(leaves, dense, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, **near)


def test_log_probs_of_a_set_without_the_token_are_refused() -> None:
    case = small_case("linear", vocab=VOCABULARY)
    with pytest.raises(ValueError, match=r"^kept_ids: got a set without the token at"):
        linear_logps(case.hidden, case.weight, case.tokens, kept_ids=(case.tokens[..., None] + 1) % VOCABULARY)
    with pytest.raises(ValueError, match=r"^kept_ids: got None with kept_offsets"):
        linear_logps(case.hidden, case.weight, case.tokens, kept_offsets=case.tokens)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [False, True], ids=["all columns", "some columns"])
def test_both_ways_give_the_dense_gradients(
    way: str, share: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces of a few tokens, and of a few rows of the head."""
    monkeypatch.setenv("PREFIXLOSS_MEMORY", "1")  # on a CPU chunks are large where nobody has said
    monkeypatch.setattr(memory, "rows_in_budget", lambda *_: 2)
    monkeypatch.setattr(sparse, "_AT_ONCE", 3 * 8)
    case = small_case("linear", batch=3, length=5, width=8, vocab=VOCABULARY)
    case.mask[:] = True
    if share:  # of the columns, so few that they are picked out of the head
        case.tokens[:] = case.tokens % 3
    kept = kept_of(case.tokens)
    kept = torch.where(kept >= 3, -1, kept) if share else kept
    given = [x.detach().to(dtype).requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    made = linear_logps(given[0], given[1], case.tokens, lm_head_bias=given[2], entropy=True, kept_ids=kept)
    dense = [x.detach().double().requires_grad_() for x in given]
    scores = (dense[0] @ dense[1].T + dense[2]).masked_fill(banned_by(kept), -math.inf)
    logp = scores.log_softmax(-1)
    want = logp.gather(-1, case.tokens[..., None])[..., 0], -(logp.exp() * logp.masked_fill(logp.isinf(), 0.0)).sum(-1)
    # float32 sums of 8 numbers of size 1; gradients are rounded to the inputs' dtype
    close = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    rounded = {"rtol": 2**-8, "atol": 2**-8} if dtype == torch.bfloat16 else close
    for a, b in zip(made, want, strict=True):
        torch.testing.assert_close(a.double(), b, **close)
    # the first token has no gradient
    scale = torch.linspace(0, 2, case.tokens.numel()).reshape(case.tokens.shape)
    sum((x * scale).sum() for x in made).backward()  # type: ignore[union-attr]
    sum((x * scale).sum() for x in want).backward()  # type: ignore[union-attr]
    for a, b in zip(given, dense, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, **rounded)  # type: ignore[union-attr]


@pytest.mark.parametrize("learns", [[0], [1], [2], []])
def test_gradients_that_nobody_asks_for_are_not_made(way: str, learns: list[int]) -> None:
    case = small_case("linear", vocab=VOCABULARY)
    given = [x.detach().clone() for x in (case.hidden, case.weight, case.bias)]
    for i in learns:
        given[i].requires_grad_()
    kept = kept_of(case.tokens)
    made = linear_logps(given[0], given[1], case.tokens, lm_head_bias=given[2], kept_ids=kept)
    assert made.logps.requires_grad == bool(learns)
    if learns:
        made.logps.sum().backward()
    assert [x.grad is not None for x in given] == [i in learns for i in range(3)]


def test_nothing_scored_has_gradients_of_0(way: str) -> None:
    case = small_case("linear", vocab=VOCABULARY)
    given = [x.detach().clone().requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    nobody = torch.zeros_like(case.mask)
    made = linear_logps(
        given[0], given[1], case.tokens, mask=nobody, lm_head_bias=given[2], kept_ids=kept_of(case.tokens)
    )
    made.logps.sum().backward()
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in given)  # type: ignore[arg-type]


def test_only_the_kept_columns_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = small_case("linear", batch=4, length=8, width=64, vocab=512)
    case.mask[:] = True
    kept = torch.cat([case.tokens[..., None], (case.tokens[..., None] + torch.arange(1, 4)) % 512], -1)
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()

    def run() -> Counter:
        with Counter() as counter:
            out = linear_prefix_loss(hidden, weight, case.tokens, case.advantages, mask=case.mask, kept_ids=kept)
            out.loss.backward()
        return counter

    looked_up = []
    plain = sparse.dots
    monkeypatch.setattr(kept_columns, "dots", lambda row, *rest: looked_up.append(len(row)) or plain(row, *rest))
    counter = run()
    # one dot product a kept column; both gradients are sums of rows
    assert (counter.products, looked_up) == (0, [32 * 4])
    assert counter.largest == 512 * 64  # the head's gradient
    # where looking up is dear: the columns that any token keeps, in three products
    monkeypatch.setattr(kept_columns, "_LOOKED_UP", 10**6)
    assert run().products == 3 * 32 * len(kept.unique()) * 64
    assert looked_up == [32 * 4]


def test_values_outside_the_mask_do_not_matter(way: str) -> None:
    case = small_case("linear", vocab=VOCABULARY)
    kept = kept_of(case.tokens)
    out, grads = call(case, "torch", torch.float64, {"kept_ids": kept})
    kept[~case.mask] = 10**6
    case.hidden[~case.mask] = math.nan
    again, poisoned = call(case, "torch", torch.float64, {"kept_ids": kept})
    assert torch.equal(again.loss, out.loss)
    for a, b in zip(poisoned, grads, strict=True):
        assert torch.equal(a, b)


def wrong(change: Any) -> dict[str, Any]:
    case = small_case("linear", vocab=VOCABULARY)
    return change(case, kept_of(case.tokens, least=2))


def without_its_token(case: Any, kept: Tensor) -> dict[str, Any]:
    kept[1, 2][kept[1, 2] == case.tokens[1, 2]] = -1
    return {"kept_ids": kept}


def with_an_id(value: int) -> Any:
    def change(case: Any, kept: Tensor) -> dict[str, Any]:
        kept[1, 2][kept[1, 2] != case.tokens[1, 2]] = value
        return {"kept_ids": kept}

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_its_token, r"kept_ids: got a set without the token at response 1, position 2, expected the scored"),
        (
            with_an_id(VOCABULARY),
            r"kept_ids: got an id outside at response 1, position 2, expected ids in \[0, V\) with V",
        ),
        (with_an_id(-2), r"kept_ids: got an id outside at response 1, position 2"),
        (lambda c, k: {"kept_ids": k[..., [0, 0, 1, 1]].clamp(min=0)}, r"kept_ids: got an id twice at response"),
        (lambda c, k: {"kept_ids": k[:, 1:]}, r"kept_ids: got shape \[3, 3, 4\], expected \[\*tokens.shape, K\]"),
        (lambda c, k: {"kept_ids": k[..., 0]}, r"kept_ids: got shape \[3, 4\]"),
        (lambda c, k: {"kept_offsets": k[0, 0]}, r"kept_ids: got None with kept_offsets"),
        (lambda c, k: {"kept_ids": k, "kept_offsets": k[0, 0]}, r"kept_ids: got shape .* with kept_offsets, expected"),
        (
            lambda c, k: {**packed_sets(k), "kept_offsets": packed_sets(k)["kept_offsets"][:-1]},
            r"kept_offsets: got shape \[12\], expected .*\[N \+ 1\]",
        ),
        (
            lambda c, k: {**packed_sets(k), "kept_offsets": packed_sets(k)["kept_offsets"] + 1},
            r"kept_offsets: got \[1, .*\], expected increasing offsets from 0 to M",
        ),
    ],
)
def test_wrong_sets_are_errors_that_say_what_and_where(change: Any, message: str) -> None:
    case = small_case("linear", vocab=VOCABULARY)
    with pytest.raises(ValueError, match=f"^{message}"):
        linear_prefix_loss(case.hidden, case.weight, case.tokens, case.advantages, mask=case.mask, **wrong(change))


def test_the_sets_are_whole_numbers_and_not_for_a_split_head() -> None:
    case = small_case("linear", vocab=VOCABULARY)
    with pytest.raises(TypeError, match=r"^kept_ids: got float"):
        linear_prefix_loss(
            case.hidden, case.weight, case.tokens, case.advantages, kept_ids=kept_of(case.tokens).float()
        )
    with pytest.raises(ValueError, match=r"^inplace: got True with kept_ids"):
        prefix_loss(case.hidden, case.tokens, case.advantages, kept_ids=kept_of(case.tokens), inplace=True)
