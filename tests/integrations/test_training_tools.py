"""Our functions in a loop of one's own: activation checkpointing, autocast, loss scaling, one compiled graph.

`Policy` is any model whose forward ends in one of them. Both back-ends; the kernels run in Triton's interpreter.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prefixloss import LossConfig, linear_logps, linear_prefix_loss, prefix_loss

B, T, D, V = 2, 4, 8, 24
CONFIG = LossConfig(kl="k3", kl_coef=0.1)
SEQUENCE = LossConfig(ratio_level="sequence")  # needs logits once more in the backward
KINDS = ("linear_prefix_loss", "two stages", "linear_logps", "prefix_loss", "prefix_loss in place")
BACKENDS = ("torch", "triton")


class Policy(nn.Module):
    """Tied embeddings, one layer, and the loss."""

    def __init__(self, kind: str, backend: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.backend = kind, backend
        self.embed = nn.Embedding(V, D, dtype=dtype)
        self.body = nn.Linear(D, D, dtype=dtype)

    def hidden(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.body(self.embed(ids)))

    def logits(self, hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        """What the loss is made of: hidden states and the head, or logits."""
        return (hidden @ weight.t(),) if self.kind.startswith("prefix_loss") else (hidden, weight)

    def loss(self, hidden: Tensor, weight: Tensor, given: dict[str, Any]) -> Tensor:
        return self.loss_of(self.logits(hidden, weight), given)

    def loss_of(self, rows: tuple[Tensor, ...], given: dict[str, Any]) -> Tensor:
        tokens, advantages = given["tokens"], given["advantages"]
        rest = {"mask": given["mask"], "old_logps": given["old"], "backend": self.backend}
        if self.kind == "linear_prefix_loss":
            return linear_prefix_loss(*rows, tokens, advantages, ref_logps=given["old"], config=CONFIG, **rest).loss
        if self.kind == "two stages":
            return linear_prefix_loss(*rows, tokens, advantages, config=SEQUENCE, **rest).loss
        if self.kind == "linear_logps":
            made = linear_logps(*rows, tokens, mask=given["mask"], backend=self.backend)
            return -(made.logps * advantages[:, None]).sum() / 7
        return prefix_loss(*rows, tokens, advantages, inplace=self.kind == "prefix_loss in place", **rest).loss

    def forward(self, ids: Tensor, given: dict[str, Any]) -> Tensor:
        return self.loss(self.hidden(ids), self.embed.weight, given)


def batch() -> tuple[Tensor, dict[str, Any]]:
    g = torch.Generator().manual_seed(1)
    ids, tokens = torch.randint(V, (2, B, T), generator=g)
    return ids, {
        "tokens": tokens, "mask": torch.arange(T) < torch.tensor([4, 2])[:, None],
        "advantages": torch.tensor([1.0, -0.5]), "old": torch.randn(B, T, generator=g) * 0.3 - 3,
    }  # fmt: skip


def gradients(model: nn.Module) -> list[Tensor]:
    made = []
    for p in model.parameters():
        assert p.grad is not None
        assert p.grad.any()
        made.append(p.grad)
    return made


def trained(kind: str, backend: str) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients without any tool."""
    model = Policy(kind, backend)
    loss = model(*batch())
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpointed_body_and_loss(kind: str, backend: str, use_reentrant: bool) -> None:
    """The loss is made again in the backward, bit for bit."""
    ids, given = batch()
    model = Policy(kind, backend)
    body = checkpoint(lambda x: torch.tanh(model.body(x)), model.embed(ids), use_reentrant=use_reentrant)
    loss = checkpoint(lambda h, w: model.loss(h, w, given), body, model.embed.weight, use_reentrant=use_reentrant)
    loss.backward()
    want, theirs = trained(kind, backend)
    assert torch.equal(loss, want)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), theirs, strict=True))


@pytest.mark.parametrize("use_reentrant", [None, False])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS[:4])
def test_a_second_backward_has_its_own_factor(kind: str, backend: str, use_reentrant: bool | None) -> None:
    """With and without checkpointing, which makes everything again for each."""
    ids, given = batch()
    model = Policy(kind, backend)
    hidden = model.hidden(ids)
    if use_reentrant is None:
        loss = model.loss(hidden, model.embed.weight, given)
    else:
        again = lambda h, w: model.loss(h, w, given)
        loss = checkpoint(again, hidden, model.embed.weight, use_reentrant=use_reentrant)
    (first,) = torch.autograd.grad(3 * loss, model.embed.weight, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(-0.5 * loss, model.embed.weight, retain_graph=True)
    (third,) = torch.autograd.grad(3 * loss, model.embed.weight)
    assert torch.equal(first, kept)
    torch.testing.assert_close(second, -first / 6, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(third, first, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_reaches_the_body_and_not_the_loss(kind: str, backend: str) -> None:
    """The loss takes the bfloat16 that the body (or the product of the logits) made and works in float32: as it would
    outside."""
    ids, given = batch()
    results = []
    for inside in (True, False):
        model = Policy(kind, backend)
        with torch.autocast("cpu", torch.bfloat16):
            rows = model.logits(model.hidden(ids), model.embed.weight)
            assert rows[0].dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            loss = model.loss_of(rows, given)
        assert loss.dtype == torch.float32
        loss.backward()
        results.append([loss.detach(), *gradients(model)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_grad_scaler_gives_the_same_gradients_once_unscaled(kind: str, backend: str) -> None:
    """Scaled by a power of two: to the bit, but for the in-place ones, whose smallest numbers it saves."""
    model = Policy(kind, backend)
    optimiser, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(model(*batch())).backward()
    scaler.unscale_(optimiser)
    for ours, theirs in zip(gradients(model), trained(kind, backend)[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-12)
    before = model.body.weight.detach().clone()
    scaler.step(optimiser)
    scaler.update()
    assert not torch.equal(before, model.body.weight)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_with_an_infinite_gradient_is_skipped(kind: str, backend: str) -> None:
    model = Policy(kind, backend)
    optimiser, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=2.0**16)
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale(model(*batch()) * torch.inf).backward()
    scaler.step(optimiser)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert scaler.get_scale() == 2.0**15


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_scaling_saves_float16_gradients_that_are_too_small_without_it(kind: str, backend: str) -> None:
    """A loss of 1e-6 of the usual: float16 has no number for its gradients unless they are scaled before."""
    tiny, scale = 1e-6, 2.0**16
    model = Policy(kind, backend, torch.float16)
    (model(*batch()) * tiny * scale).backward()
    want = Policy(kind, backend, torch.float64) if backend == "torch" else Policy(kind, backend)
    want.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    want(*batch()).backward()
    for ours, exact in zip(gradients(model), gradients(want), strict=True):
        # bodies multiply in float16: a few roundings of 2^-11 each, and numbers next to the largest
        error = (ours.double() / (tiny * scale) - exact.double()).abs().max()
        assert error <= 2**-6 * exact.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_policy_is_one_graph(kind: str) -> None:
    """By backend="torch"; for the kernels see test_operators.py."""
    torch._dynamo.reset()
    model = Policy(kind, "torch")
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(*batch())
    loss.backward()
    want, theirs = trained(kind, "torch")
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-7)
    for ours, plain in zip(gradients(model), theirs, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["linear_prefix_loss", "linear_logps"])
def test_a_compiled_policy_under_autocast_checkpointing_and_scaling(kind: str) -> None:
    """All tools at once, against the same without compilation."""
    results = []
    for compiles in (False, True):
        torch._dynamo.reset()
        model = Policy(kind, "torch")

        def step(ids: Tensor, given: dict[str, Any], model: Policy = model) -> Tensor:
            hidden = checkpoint(model.hidden, ids, use_reentrant=False)
            return model.loss(hidden, model.embed.weight, given)

        call = torch.compile(step, fullgraph=True, backend="aot_eager") if compiles else step
        optimiser, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu")
        with torch.autocast("cpu", torch.bfloat16):
            loss = call(*batch())
        scaler.scale(loss).backward()
        scaler.unscale_(optimiser)
        results.append([loss.detach(), *gradients(model)])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-7)
