"""Is a model what the loss takes it for? One small forward at patch time tells.

Known numbers leave the head in place of its logits, so that what the model makes of them afterwards (a scale, a cap,
anything else) shows whatever the weights are; and the head's own product is compared with ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prefixloss import check
from prefixloss.integrations.heads_of_models import Linear, LogitMap, linear_of


class Probe:
    """Stands for the head once: keeps what goes in and out, and lets known numbers out in place of logits."""

    def __init__(self, own_head: Callable[..., Tensor]) -> None:
        self.own_head = own_head
        self.calls = 0
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, head: Any, hidden: Tensor) -> Tensor:
        self.calls += 1
        linear = linear_of(head, hidden)  # refuses other heads
        self.hidden, self.logits = hidden, self.own_head(head, hidden)
        self.alike = _same_product(linear, self.logits)
        known = 3 * torch.randn(self.logits.shape, generator=self.generator)
        self.known = known.to(self.logits)
        return self.known.clone()


@torch.no_grad()
def verified(model: Any, entry: Any, probe: Probe) -> LogitMap:
    """What becomes of the head's logits, `probe` standing for the head. ValueError where they are not a linear head's,
    or not causal. entry: what to call, the model or a wrapper around it."""
    name, expected = type(model).__name__, "a causal language model with one linear LM head"
    if any(p.is_meta for p in model.parameters()):
        check.fail("model", f"{name} with parameters on the meta device", "loaded ones, or verify=False")
    ids = _two_rows(model)
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        output = entry(input_ids=ids, return_dict=True)
    except (TypeError, RuntimeError, IndexError, AttributeError, KeyError, AssertionError) as error:
        got = f"{name}, whose forward failed on token ids alone ({error})"
        raise ValueError(f"model: got {got}, expected {expected}") from error
    finally:
        for module, flag in training.items():
            module.training = flag
    if probe.calls != 1:
        check.fail("model", f"{name}, which calls its head {probe.calls} times", expected)
    if not probe.alike:
        check.fail("model", f"{name}, whose head adds something to its product with the hidden states", expected)
    before = probe.hidden[:, :-1]
    if probe.hidden.shape[:2] != ids.shape or not _same(before[0], before[1], before.dtype):
        check.fail("model", f"{name}, where a token changes what comes before it", expected)
    logits = getattr(output, "logits", None)
    if logits is not None and logits.shape == probe.known.shape:
        for candidate in LogitMap.candidates(model.config):
            if _same(candidate(probe.known.double()), logits, probe.known.dtype):
                return candidate
    wants = "softcap * tanh(logit_scale * z / softcap) of its head's z, with softcap and scale in its config"
    check.fail("model", f"{name}, which makes something unknown of its head's logits", wants)
    raise AssertionError


def _same_product(linear: Linear, logits: Tensor) -> bool:
    """|error| <= a few roundings times |h| |w|, whatever the order of the sum; GPUs may multiply in TF32."""
    hidden, weight, bias = (None if x is None else x.double() for x in linear)
    assert hidden is not None
    assert weight is not None
    product = hidden @ weight.t()
    size = hidden.norm(dim=-1, keepdim=True) * weight.norm(dim=1)
    if bias is not None:
        product, size = product + bias, size + bias.abs()
    rounding = max(torch.finfo(logits.dtype).eps, 2**-10 if logits.is_cuda and logits.dtype == torch.float32 else 0)
    return bool(((product - logits).abs() <= 8 * rounding * size).all())


def _same(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """But for a few roundings of the largest to `dtype`: a cap has three steps."""
    a, b = a.double(), b.double()
    return bool(((a - b).abs() <= 8 * torch.finfo(dtype).eps * b.abs().max()).all())


def _two_rows(model: Any) -> Tensor:
    """int64 [2, 6]: two sequences of ordinary tokens that differ in the last."""
    configs = (model.config.to_dict(), model.config.get_text_config().to_dict())
    special = {
        v for c in configs for k, v in c.items() if k.endswith(("token_id", "token_index")) and isinstance(v, int)
    }
    known = model.config.get_text_config().vocab_size
    usual = torch.tensor([i for i in range(min(known, 1000)) if i not in special] or [0])
    row = usual[torch.randint(len(usual), (7,), generator=torch.Generator().manual_seed(1))]
    row[-1] = usual[(usual == row[-2]).nonzero()[0, 0] - 1]
    return torch.stack([row[:6], torch.cat([row[:5], row[6:]])]).to(next(model.parameters()).device)
