"""Is a model what the loss takes it for? A few small forwards at patch time tell.

Known numbers leave the head in place of its logits, so that what the model makes of them afterwards (a scale, a cap,
anything else) shows whatever the weights are; and the head's own product is compared with ours. Up to three more show
what it makes of padding on the left, and of sequences packed into one row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from prefixloss import check
from prefixloss.integrations.models.heads import Linear, LogitMap, linear_of
from prefixloss.integrations.models.positions import position_ids, takes_positions

FAILURES = (TypeError, RuntimeError, IndexError, AttributeError, KeyError, AssertionError)


class Known(NamedTuple):
    """What is known of a model.

    map: what becomes of its head's logits. needs_positions: with padding on the left its forward has to be given
    position ids. pads_left: padding on the left then changes nothing. packs: position ids [1, N] that start again keep
    the sequences of one row apart.
    """

    map: LogitMap
    needs_positions: bool
    pads_left: bool
    packs: bool

    @classmethod
    def unverified(cls, model: Any) -> Known:
        """Taken on trust. Position ids as generation would make them."""
        return cls(next(LogitMap.candidates(model.config)), takes_positions(model), True, True)


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
def verified(model: Any, entry: Any, probe: Probe) -> Known:
    """What is known of a model, `probe` standing for its head. ValueError where its logits are not a linear head's, or
    not causal. entry: what to call, the model or a wrapper around it."""
    if any(p.is_meta for p in model.parameters()):
        check.fail(
            "model", f"{type(model).__name__} with parameters on the meta device", "loaded ones, or verify=False"
        )
    ids = _two_rows(model)
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        found = _logit_map(model, entry, probe, ids)
        alone = probe.hidden
        return Known(found, *_left_padding(model, entry, probe, ids, alone), _packs(model, entry, probe, ids, alone))
    finally:
        for module, flag in training.items():
            module.training = flag


def _logit_map(model: Any, entry: Any, probe: Probe, ids: Tensor) -> LogitMap:
    name, expected = type(model).__name__, "a causal language model with one linear LM head"
    try:
        output = entry(input_ids=ids, return_dict=True)
    except FAILURES as error:
        got = f"{name}, whose forward failed on token ids alone ({error})"
        raise ValueError(f"model: got {got}, expected {expected}") from error
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


def _left_padding(model: Any, entry: Any, probe: Probe, ids: Tensor, alone: Tensor) -> tuple[bool, bool]:
    """(needs_positions, pads_left). alone: the hidden states without padding."""
    places = _places(model)
    width = min(ids.shape[1], ids.shape[1] if places is None else places - ids.shape[1])
    if width < 1:
        return takes_positions(model), True
    padded = pad(ids, (width, 0), value=_padding_id(model))
    mask = pad(torch.ones_like(ids), (width, 0))
    near = _near(alone)
    plain = _distance(model, entry, probe, alone, input_ids=padded, attention_mask=mask)
    if plain <= near / 16:
        return False, True
    if takes_positions(model):
        made = position_ids(mask, mask.shape[1])
        given = _distance(model, entry, probe, alone, input_ids=padded, attention_mask=mask, position_ids=made)
        if given <= min(near, plain / 4):
            return True, True
    return False, plain <= near


def _packs(model: Any, entry: Any, probe: Probe, ids: Tensor, alone: Tensor) -> bool:
    """Whether the second of two sequences in a row is as it is alone."""
    if not takes_positions(model):
        return False
    length = ids.shape[1]
    row = torch.cat([ids[1].flip(0), ids[0]])[None]
    made = torch.arange(length, device=ids.device).repeat(2)[None]
    return _distance(model, entry, probe, alone[:1], input_ids=row, position_ids=made) <= _near(alone) / 4


def _distance(model: Any, entry: Any, probe: Probe, alone: Tensor, **inputs: Tensor) -> float:
    """|h - alone| / |alone| of the last hidden states that the head is given; infinite where the forward fails."""
    probe.hidden = alone.new_zeros(0)
    # with a cache a model does not look for sequences in its row
    uncached = {"use_cache": False} if "use_cache" in inspect.signature(type(model).forward).parameters else {}
    try:
        entry(**inputs, **uncached, return_dict=True)
    except FAILURES:
        return float("inf")
    if probe.hidden.dim() != 3 or probe.hidden.shape[1] < alone.shape[1]:
        return float("inf")
    last = probe.hidden[:, -alone.shape[1] :].double()
    return float((last - alone).norm() / alone.double().norm())


def _near(hidden: Tensor) -> float:
    """How far two ways to the same hidden states may be apart: roundings add up over layers."""
    rounding = max(torch.finfo(hidden.dtype).eps, 2**-10 if hidden.is_cuda and hidden.dtype == torch.float32 else 0)
    return max(32 * rounding, 1e-3)


def _places(model: Any) -> int | None:
    """How many positions a model has, where it says so."""
    config = model.config.get_text_config()
    return next((n for name in ("max_position_embeddings", "n_positions") if (n := getattr(config, name, None))), None)


def _padding_id(model: Any) -> int:
    known = model.config.get_text_config()
    made = getattr(known, "pad_token_id", None)
    return made if isinstance(made, int) and 0 <= made < known.vocab_size else 0


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
