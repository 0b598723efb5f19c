"""transformers from 4.57 on: the fused loss inside a causal language model's own forward.

    patch_model(model, LossConfig(reduction="token-mean"))
    out = model(input_ids=ids, attention_mask=seen, prefix_loss=PrefixBatch(mask, advantages, old_logps=old))
    out.loss.backward()

`model` runs as it always does, up to its LM head, which gives the loss in place of logits: hooks of DDP, FSDP2, PEFT,
gradient checkpointing and autocast see nothing unusual, and the logits [B, L, V] are never made. Without `prefix_loss`
the forward is the model's own.
"""

from __future__ import annotations

import functools
import inspect
import types
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from prefixloss import check
from prefixloss.config import LossConfig
from prefixloss.inputs.token_advantages import TokenAdvantages
from prefixloss.integrations import installed
from prefixloss.integrations.models import positions
from prefixloss.integrations.models.check import Known, Probe, verified
from prefixloss.integrations.models.heads import chosen_module, entrance, linear_of, refuse_quantised, unwrapped
from prefixloss.loss import LossOutput, linear_prefix_loss

installed.check_version("transformers", "4.57")  # before its imports can fail in words of their own

from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled  # noqa: E402
from transformers.utils import ModelOutput  # noqa: E402

AUX_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")
PER_TOKEN = ("tokens", "advantages", "old_logps", "sampler_logps", "ref_logps")


class PrefixBatch:
    """What the loss needs beside the model's inputs. B sequences; T: the last T columns of `input_ids`.

    Everything is about the tokens where they stand: column t of T says something about the token in column t, and the
    shift to the position that predicts it is made here. T may be all columns, all but the first, or those of the
    responses behind prompts that were padded on the left. The very first column, which nothing predicts, is not scored.

    mask: bool or 0/1 [B, T]: tokens of responses, with neither prompt nor padding.
    advantages: float [B], float [B, T] or `TokenAdvantages`.
    old_logps, sampler_logps, ref_logps: float32 [B, T]. `out.logps` has this form.
    tokens: int64 [B, T]; None takes those of `input_ids`.
    ref_hidden: [B, L, D_ref], what the reference's head was given for the same input_ids [B, L], for kl="full", with
        ref_lm_head_weight and ref_lm_head_bias.
    cu_seqlens: [B + 1]: several sequences in one row, without padding: `input_ids` and T are [1, N] then.
    group_ids, normalizer, max_learning_tokens: as in `linear_prefix_loss`.
    config: in place of the patch's.
    aux_scale: of the router's loss: 1 / K with K micro-batches a step.

    A plain object, neither a dataclass nor a pytree: FSDP2's mixed precision rounds the tensors that it finds in those.
    """

    mask: Tensor
    advantages: Tensor | TokenAdvantages
    old_logps: Tensor | None
    sampler_logps: Tensor | None
    ref_logps: Tensor | None
    tokens: Tensor | None
    ref_hidden: Tensor | None
    ref_lm_head_weight: Tensor | None
    ref_lm_head_bias: Tensor | None
    cu_seqlens: Tensor | None
    group_ids: Tensor | None
    normalizer: float | Tensor | None
    max_learning_tokens: int | None
    config: LossConfig | None
    aux_scale: float

    def __init__(self, mask: Tensor, advantages: Tensor | TokenAdvantages, **others: Any) -> None:
        names = list(PrefixBatch.__annotations__)
        for name in others:
            if name not in names:
                check.fail("PrefixBatch", f"{name!r}", f"some of {', '.join(names)}", TypeError)
        given = {"mask": mask, "advantages": advantages, "aux_scale": 1.0, **others}
        vars(self).update({name: given.get(name) for name in names})

    def replace(self, **changes: Any) -> PrefixBatch:
        """The same with some fields changed."""
        return PrefixBatch(**{**vars(self), **changes})


@dataclass
class PrefixLossOutput(ModelOutput):  # type: ignore[misc]
    """loss: differentiable, with the router's loss in it (but for reduction="none", where it stands alone in
    `aux_loss`). logps, entropy, kl, learning: like the batch's mask. metrics: see `prefixloss.maths.metrics`. The
    others are the model's own."""

    loss: Tensor | None = None
    logps: Tensor | None = None
    entropy: Tensor | None = None
    kl: Tensor | None = None
    learning: Tensor | None = None
    metrics: dict[str, Tensor] | None = None
    aux_loss: Tensor | None = None
    hidden_states: Any = None
    attentions: Any = None
    router_logits: Any = None


def patch_model(model: Any, config: LossConfig = LossConfig(), *, backend: str = "auto", verify: bool = True) -> Patch:
    """Lets `model(..., prefix_loss=PrefixBatch(...))` return a `PrefixLossOutput`; a dict of its fields will do too.

    model: a causal language model of transformers, in DDP, PEFT or torch.compile or not. The scale and the softcap of
    its logits are the model's; the temperature is config's. backend: as in `linear_prefix_loss`. verify: one small
    forward shows whether the model's logits are what the loss takes them for; without it (for parameters on the meta
    device) that is taken on trust.

    Returns what undoes it: call it, or use it as a context manager.

    ValueError: the model's logits are not those of one linear head, scaled and capped in a known way; or it is not
    causal; or it is patched already.
    """
    inner = unwrapped(model)
    name = type(inner).__name__
    check.config(config, LossConfig)
    wants = "a causal language model of transformers with one linear LM head"
    if not hasattr(inner, "get_output_embeddings") or inner.get_output_embeddings() is None:
        check.fail("model", f"{name}, which has no LM head", wants)
    if getattr(inner.config, "is_encoder_decoder", False):
        check.fail("model", f"{name}, an encoder and a decoder", wants)
    if hasattr(inner, "_prefixloss"):
        check.fail("model", f"{name}, which is patched already", "one that is not: undo that patch first")
    patch = Patch(inner, config, backend)
    try:
        patch.settle(entrance(model) if verify else None)
    except BaseException:
        patch()
        raise
    return patch


class Patch:
    """An active `patch_model`; calling it, or leaving it as a context, undoes it."""

    def __init__(self, model: Any, config: LossConfig, backend: str) -> None:
        self.model, self.config, self.backend = model, config, backend
        self.known, self.settled = Known.unverified(model), config
        self.names = list(inspect.signature(type(model).forward).parameters)[1:]
        self.own = vars(model).get("forward")  # another patch's, if any
        self.heads: list[Any] = []

        # the original signature: `generate` validates its arguments against it
        @functools.wraps(type(model).forward)
        def forward(this: Any, *args: Any, prefix_loss: Any = None, **kwargs: Any) -> Any:
            if prefix_loss is None:
                return this._prefixloss.plain(this, *args, **kwargs)
            return this._prefixloss.forward(this, prefix_loss, args, kwargs)

        self.made = types.MethodType(forward, model)
        model._prefixloss, model.forward = self, self.made

    def plain(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        return type(model).forward(model, *args, **kwargs) if self.own is None else self.own(*args, **kwargs)

    def forward(self, model: Any, given: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PrefixLossOutput:
        batch = _batch(given)
        if kwargs.get("labels") is not None:
            check.fail("labels", "a value beside prefix_loss", "None: there is one loss")
        if is_deepspeed_zero3_enabled():
            raise RuntimeError("model: got a head sharded by DeepSpeed ZeRO-3, expected FSDP2 or an unsharded one")
        kwargs = {**kwargs, "return_dict": True} if _returns_tuples(model, kwargs) else kwargs
        if "use_cache" in self.names and kwargs.get("past_key_values") is None:
            kwargs = {"use_cache": False, **kwargs}
        inputs = positions.Inputs(self.names, args, kwargs)
        config = self.settled if batch.config is None else self._config(batch.config)
        self._tell_apart(model, batch, inputs)
        call = _Call(batch, inputs, config, self.backend)
        head = self._ready_head(model)
        head._prefixloss.call = call
        try:
            output = self.plain(model, *inputs.args, **inputs.kwargs)
        finally:
            head._prefixloss.call = None
        if call.output is None or call.loss is None:
            check.fail("model", f"{type(model).__name__}, which did not call its head", "one that does, once")
        return _returned(model, call, output)

    def _tell_apart(self, model: Any, batch: PrefixBatch, inputs: positions.Inputs) -> None:
        """Sees to it that no token is read through padding, or from another sequence of its row."""
        if batch.cu_seqlens is not None:
            _check_packed(model, self.known, batch.cu_seqlens, inputs)
        padding, length = inputs.padding, inputs.length
        if padding is None or length is None:
            return
        if not self.known.pads_left and bool(((padding[:, :-1] == 0) & (padding[:, 1:] != 0)).any()):
            got = f"padding before tokens of {type(model).__name__}, which reads on through it"
            check.fail("attention_mask", got, "padding behind them alone")
        if self.known.needs_positions and inputs["position_ids"] is None:
            inputs["position_ids"] = positions.position_ids(padding, length)

    def _config(self, config: LossConfig) -> LossConfig:
        """With the model's scale and cap."""
        known = self.known.map
        if config.softcap not in (None, known.softcap):
            check.fail("softcap", repr(config.softcap), f"None: the model's own is {known.softcap}")
        if config.logit_scale not in (1.0, known.scale):
            check.fail("logit_scale", repr(config.logit_scale), f"1.0: the model's own is {known.scale}")
        return replace(config, softcap=known.softcap, logit_scale=known.scale)

    def _ready_head(self, model: Any) -> Any:
        """Looked up in every call: PEFT replaces heads."""
        head = chosen_module(model.get_output_embeddings())
        if "_prefixloss" not in vars(head):
            self._install(head)
        return head

    def _install(self, head: Any) -> None:
        refuse_quantised(head)
        head._prefixloss = _Slot(vars(head).get("forward"))
        head.forward = types.MethodType(_head_forward, head)
        self.heads.append(head)

    def settle(self, entry: Any) -> None:
        """Makes the head ready and, where there is something to call, finds out what becomes of its logits."""
        slot = self._ready_head(self.model)._prefixloss
        if entry is not None:
            slot.call = probe = Probe(_own_head)
            try:
                self.known = verified(self.model, entry, probe)
            finally:
                slot.call = None
        self.settled = self._config(self.config)

    def __call__(self) -> None:
        if vars(self.model).get("_prefixloss") is not self:
            return
        if vars(self.model).get("forward") is self.made:
            del self.model.forward
            if self.own is not None:
                self.model.forward = self.own
            del self.model._prefixloss
        else:
            raise RuntimeError("model: its forward was wrapped after patch_model, expected that wrapper undone first")
        for head in self.heads:
            slot = vars(head).pop("_prefixloss")
            del head.forward
            if slot.own is not None:
                head.forward = slot.own

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self()


class _Slot:
    """In a head: its own forward, if it was replaced before, and what stands for it now, if anything does."""

    def __init__(self, own: Any) -> None:
        self.own = own
        self.call: Any = None


def _head_forward(head: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    slot = head._prefixloss
    if slot.call is None:
        return _own_head(head, hidden, *args, **kwargs)
    if args or any(value is not None for value in kwargs.values()):
        check.fail("model", "a head called with more than hidden states", "hidden states alone (no adapter_names)")
    return slot.call(head, hidden)


def _own_head(head: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    own = head._prefixloss.own
    return type(head).forward(head, hidden, *args, **kwargs) if own is None else own(hidden, *args, **kwargs)


# ---- one call ----------------------------------------------------------------------------------------------


class _Call:
    """Stands for the head in one forward, and makes the loss there."""

    def __init__(self, batch: PrefixBatch, inputs: positions.Inputs, config: LossConfig, backend: str) -> None:
        self.batch, self.config, self.backend = batch, config, backend
        self.tokens = _tokens(batch, inputs["input_ids"])
        self.columns = inputs.length
        length = self.tokens.shape[1] if self.columns is None else self.columns
        if length < self.tokens.shape[1]:
            check.fail("mask", batch.mask, f"[B, T], the last T of the {length} columns of the model's input")
        device = self.tokens.device
        self.follows = positions.follows(inputs.padding, batch.cu_seqlens, length, device)
        keep = inputs["logits_to_keep"]
        self.kept = positions.kept(keep, length, device)
        _check_followed(batch.mask, self.follows)
        # a number above T says enough, whatever the mask is
        if self.kept is not None and (isinstance(keep, Tensor) or len(self.kept) <= batch.mask.shape[1]):
            _check_kept(batch.mask, self.follows, self.kept)
        self.output: LossOutput | None = None
        self.loss: Tensor | None = None

    def __call__(self, head: Any, hidden: Tensor) -> Tensor:
        if self.output is not None:
            check.fail("model", "one that calls its head several times", "one that does, once")
        batch, tokens = self.batch, self.tokens
        self._check_hidden(hidden)
        linear = linear_of(head, hidden)
        given = {name: getattr(batch, name) for name in PER_TOKEN} | {"tokens": tokens, "mask": self._mask()}
        rows = {name: self._at_predictors(x, hidden.device) for name, x in given.items()}
        offsets = batch.cu_seqlens
        if offsets is not None and self.kept is not None:
            offsets = torch.searchsorted(self.kept, offsets.to(self.kept.device))
        self.output = linear_prefix_loss(
            linear.hidden if offsets is None else linear.hidden[0],
            linear.weight,
            cu_seqlens=offsets,
            ref_hidden=self._ref_hidden(),
            ref_lm_head_weight=batch.ref_lm_head_weight,
            ref_lm_head_bias=batch.ref_lm_head_bias,
            lm_head_bias=linear.bias,
            group_ids=batch.group_ids,
            normalizer=batch.normalizer,
            max_learning_tokens=batch.max_learning_tokens,
            config=self.config,
            backend=self.backend,
            **rows,
        )
        # wrappers hang their backward hooks on what the head returns; what the model makes of it has no effect
        returned = self.output.loss.reshape(1, -1, 1)
        self.loss = returned.clone().reshape(self.output.loss.shape)
        return returned

    def _check_hidden(self, hidden: Tensor) -> None:
        """And how many columns come before those of the tokens, less one: for the position before each."""
        responses, columns = self.tokens.shape
        made = hidden.shape[1] if hidden.dim() == 3 else 0
        # a model may put columns of its own before those of its inputs
        length = made if self.columns is None or self.kept is None else self.columns
        wanted = max(columns, self.columns or 0) if self.kept is None else len(self.kept)
        if hidden.shape[0] != responses or made < wanted or (self.kept is not None and made != wanted):
            wants = f"[B, L, D] with B = {responses} and L = {wanted}, as of input_ids and mask"
            check.fail("model", f"hidden states of shape {list(hidden.shape)} at its head", wants)
        self.length, self.before = length, length - columns - 1

    def _mask(self) -> Tensor:
        """Without tokens that nothing predicts. Where values are not looked at, they may be in the batch's."""
        mask = self.batch.mask
        return mask.to(self.follows.device) * self.follows[:, -mask.shape[1] :]

    def _ref_hidden(self) -> Tensor | None:
        x = self.batch.ref_hidden
        if x is not None and self.kept is not None and x.dim() == 3 and x.shape[1] == self.length:
            x = x[:, self.kept.to(x.device)]
        return x if x is None or self.batch.cu_seqlens is None else x[0]

    def _at_predictors(self, x: Any, device: torch.device) -> Any:
        """From the tokens' own columns to those of the positions that predict them, of all that the head was given."""
        if isinstance(x, TokenAdvantages):
            return TokenAdvantages(*(part.to(device) for part in x))
        if x is None or x.dim() == 1:
            return x if x is None else x.to(device)
        moved = pad(x.to(device), (self.before, 1))
        moved = moved if self.kept is None else moved[:, self.kept.to(device)]
        return moved if self.batch.cu_seqlens is None else moved[0]

    def at_tokens(self, x: Tensor) -> Tensor:
        """And back."""
        x = x if self.batch.cu_seqlens is None else x[None]
        if self.kept is not None:
            made, x = x, x.new_zeros(len(x), self.length)
            x[:, self.kept.to(x.device)] = made
        return pad(x, (-self.before, -1))


def _check_followed(mask: Tensor, follows: Tensor) -> None:
    """Each scored token has one before it, from which it is predicted."""
    unpredicted = (mask.to(follows.device) != 0) & ~follows[:, -mask.shape[1] :]
    if check.readable(unpredicted) and bool(unpredicted.any()):
        check.fail("mask", "a sequence whose first token is scored", "False there: nothing predicts it")


def _check_kept(mask: Tensor, follows: Tensor, kept: Tensor) -> None:
    """The logits before each scored token are among those that the model makes."""
    columns, length = mask.shape[1], follows.shape[1]
    after = torch.zeros(length + 1, dtype=torch.bool, device=kept.device).index_fill(0, kept + 1, True)[:length]
    left_out = (mask.to(follows.device) != 0) & (follows & ~after)[:, -columns:]
    # worth a look at the values, wherever they are: without it the loss would be of other tokens
    if torch.compiler.is_compiling() or bool(left_out.any()):
        wants = f"the positions before all scored tokens: {columns + 1} for the last {columns} columns"
        check.fail("logits_to_keep", f"{len(kept)} of {length} positions", wants)


def _check_packed(model: Any, known: Known, cu_seqlens: Tensor, inputs: positions.Inputs) -> None:
    """Several sequences of one row are kept apart by the model's attention, which has to be told of them."""
    ids, mask = inputs["position_ids"], inputs["attention_mask"]
    if inputs.length is not None:
        check.layout(torch.Size([inputs.length]), None, cu_seqlens)
    several = (cu_seqlens.diff() > 0).sum() > 1 if check.readable(cu_seqlens) else len(cu_seqlens) > 2
    told = isinstance(mask, Tensor) and mask.dim() == 4
    flash = "flash" in str(getattr(model.config, "_attn_implementation", None))
    if not several or told or (mask is not None and inputs.padding is None):
        return
    if inputs.padding is not None:
        check.fail("attention_mask", f"{check.describe(mask)} beside several sequences", "None: it would join them")
    if flash and inputs["cu_seq_lens_q"] is not None:
        return
    if inputs["use_cache"] or inputs["past_key_values"] is not None:
        check.fail("use_cache", "a cache with several sequences in a row", "False: with one the model joins them")
    if ids is None:
        check.fail("position_ids", "None with several sequences in a row", "those of each, from 0 on")
    if not known.packs and ids.dim() == 2:
        got = f"several sequences in a row of {type(model).__name__}, which lets one see another"
        check.fail("cu_seqlens", got, "one sequence a row")
    if ids.dim() == 2 and check.readable(ids) and check.readable(cu_seqlens):
        first = positions.starts(cu_seqlens.to(ids.device), ids.shape[1])[1:]
        if bool((first & (ids[0].diff() == 1)).any()):
            check.fail("position_ids", "ids that go on from one sequence into the next", "those of each, from 0 on")


def _batch(given: Any) -> PrefixBatch:
    """Checked as far as the model's inputs do not matter."""
    if isinstance(given, dict):
        for name in ("mask", "advantages"):
            if name not in given:
                check.fail("prefix_loss", f"a dict without {name!r}", "one with mask and advantages")
        given = PrefixBatch(**given)
    if not isinstance(given, PrefixBatch):
        check.fail("prefix_loss", type(given).__name__, "a PrefixBatch, or a dict of its fields", TypeError)
    check.tensor("mask", given.mask, "number")
    if given.mask.dim() != 2:
        check.fail("mask", given.mask, "[B, T], the last T columns of input_ids")
    for name in ("old_logps", "sampler_logps", "ref_logps"):
        x = getattr(given, name)
        if isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16):
            wants = "float32: half precision is too coarse for a ratio (wrappers may cast a dict, never a PrefixBatch)"
            check.fail(name, x, wants, TypeError)
    for name in PER_TOKEN:
        x = getattr(given, name)
        if isinstance(x, Tensor) and not (name == "advantages" and x.dim() == 1):
            check.shape(name, x, given.mask.shape, "[B, T], the shape of mask")
    if given.cu_seqlens is not None and len(given.mask) != 1:
        check.fail("mask", given.mask, "[1, N], since there are cu_seqlens")
    return given


def _tokens(batch: PrefixBatch, ids: Any) -> Tensor:
    """int64 [B, T]: the tokens that `mask` is about."""
    if batch.tokens is not None:
        return batch.tokens
    if ids is None:
        check.fail("input_ids", "None", "token ids, or tokens in the PrefixBatch")
    columns = batch.mask.shape[1]
    if ids.shape[0] != len(batch.mask) or ids.shape[1] < columns:
        check.fail("mask", batch.mask, f"[B, T], the last T columns of input_ids {list(ids.shape)}")
    return ids[:, -columns:]


def _returns_tuples(model: Any, kwargs: dict[str, Any]) -> bool:
    asked = kwargs.get("return_dict")
    return not (getattr(model.config, "return_dict", True) if asked is None else asked)


def _returned(model: Any, call: _Call, output: Any) -> PrefixLossOutput:
    made, loss = call.output, call.loss
    assert made is not None
    assert loss is not None
    aux = getattr(output, "aux_loss", None)
    if loss.dim():
        loss = call.at_tokens(loss)
    elif aux is not None:
        loss = loss + call.batch.aux_scale * _aux_coefficient(model) * aux.to(loss.device)
    per_token = {name: call.at_tokens(getattr(made, name)) for name in ("logps", "entropy", "kl", "learning")}
    own = {name: getattr(output, name, None) for name in ("hidden_states", "attentions", "router_logits")}
    return PrefixLossOutput(loss=loss, metrics=made.metrics, aux_loss=aux, **per_token, **own)


def _aux_coefficient(model: Any) -> float:
    """What the model's own loss multiplies its router's by."""
    for holder in (model, model.config, model.config.get_text_config()):
        for name in AUX_COEFFICIENTS:
            if getattr(holder, name, None) is not None:
                return float(getattr(holder, name))
    names = " or ".join(AUX_COEFFICIENTS)
    check.fail("model", f"{type(model).__name__}, with a router's loss and no weight for it", f"{names} in its config")
    raise AssertionError
