"""A distillation's arguments, checked and flat: the tokens that count, and what the teacher says of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefixloss import check
from prefixloss.config import LossConfig
from prefixloss.inputs.layout import Layout
from prefixloss.inputs.reduction import token_weights
from prefixloss.maths.divergence import BY_NAME, Divergence, Listed

REDUCTIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "none")


@dataclass(frozen=True)
class Distillation:
    """What is computed. Scores are softcap(logit_scale * z) / temperature, the teacher's over its own temperature."""

    divergence: Divergence
    student: LossConfig
    teacher: LossConfig

    @classmethod
    def checked(
        cls, divergence: Any, beta: Any, temperature: Any, teacher_temperature: Any, softcap: Any, logit_scale: Any,
        reduction: Any,
    ) -> Distillation:  # fmt: skip
        if not isinstance(divergence, str) or divergence not in BY_NAME:
            names = ", ".join(f'"{name}"' for name in BY_NAME)
            check.fail("divergence", check.describe(divergence), f"one of {names}")
        if not check.is_number(beta) or not 0 < beta < 1:
            wants = 'a number between 0 and 1, without both ("forward" and "reverse" are what jsd turns to there)'
            check.fail("beta", check.describe(beta), wants)
        if not isinstance(reduction, str) or reduction not in REDUCTIONS:
            check.fail("reduction", check.describe(reduction), f"one of {', '.join(map(repr, REDUCTIONS))}")
        options = {"softcap": softcap, "logit_scale": logit_scale, "reduction": reduction}
        student = LossConfig(temperature=temperature, **options)
        if teacher_temperature is None:
            return cls(Divergence(divergence, float(beta)), student, student)
        if not check.is_number(teacher_temperature) or not teacher_temperature > 0:
            check.fail("teacher_temperature", check.describe(teacher_temperature), "a finite number > 0, or None")
        teacher = LossConfig(temperature=teacher_temperature, **options)
        return cls(Divergence(divergence, float(beta)), student, teacher)


@dataclass(frozen=True)
class DistillBatch:
    """N tokens, flat. weights [N], denominator 0-d: loss = sum(weights * divergences) / denominator. learning: bool
    [N], the tokens in the mask whose weight is not 0."""

    layout: Layout
    weights: Tensor
    denominator: Tensor
    learning: Tensor


class TokensToDistil(NamedTuple):
    """The arguments that say something about tokens or responses, as the caller gave them."""

    mask: Any
    weights: Any
    cu_seqlens: Any
    normalizer: Any

    def checked(self, shape: torch.Size, config: LossConfig, dtype: torch.dtype, device: torch.device) -> DistillBatch:
        layout = Layout.of(shape, device, self.mask, self.cu_seqlens)
        if self.normalizer is not None:
            check.normalizer(self.normalizer)
        reduced, denominator = token_weights(config, layout, None, self.normalizer, dtype)
        if self.weights is None:
            return DistillBatch(layout, reduced, denominator, layout.scored)
        check.tensor("weights", self.weights, "float")
        check.shape("weights", self.weights, shape, "the shape of the tokens")
        check.device("weights", self.weights, device)
        weights = self.weights.detach().reshape(-1).to(dtype)
        layout.check_finite(weights=weights)
        learning = layout.scored & (weights != 0)
        return DistillBatch(layout, torch.where(learning, reduced * weights, 0.0), denominator, learning)


class GivenTeacher(NamedTuple):
    """The arguments that are the teacher, as the caller gave them: each is called `teacher_` and its name here."""

    hidden: Any = None
    lm_head_weight: Any = None
    lm_head_bias: Any = None
    logits: Any = None
    ids: Any = None
    logps: Any = None
    offsets: Any = None
    vocabulary: Any = None

    def is_listed(self, needed: tuple[str, ...], settings: Distillation) -> bool:
        """Whether it is ids with log-probs and not the whole vocabulary, for which all of `needed` are; never both."""
        wants = f"either {' and '.join(f'teacher_{name}' for name in needed)}, or teacher_ids and teacher_logps"
        given = {name: value for name, value in self._asdict().items() if value is not None}
        listed = [name for name in given if name in ("ids", "logps", "offsets")]
        whole = [name for name in given if name not in (*listed, "vocabulary")]
        if listed and whole:
            check.fail(f"teacher_{whole[0]}", f"a second teacher beside teacher_{listed[0]}", wants)
        for name in ("ids", "logps") if listed else needed:
            if name not in given:
                check.fail(f"teacher_{name}", "None", wants)
        if listed and settings.teacher is not settings.student:
            got = check.describe(settings.teacher.temperature)
            check.fail("teacher_temperature", got, "None, since listed log-probs are taken as given")
        return bool(listed)


class Teacher(NamedTuple):
    """One of three, the others None. first [N, D] with a head weight [V, D] and bias [V]; first [N, V] alone, logits;
    ids and logps, [N, K] with -1 where unused or packed [M] with offsets [N + 1]."""

    first: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    ids: Tensor | None = None
    logps: Tensor | None = None
    offsets: Tensor | None = None

    def listed(self, rows: Tensor, dtype: torch.dtype, vocabulary: int) -> Listed:
        """What is listed for the tokens `rows` [n]. vocabulary: of the student, without padding."""
        assert self.ids is not None
        assert self.logps is not None
        known = dtype, vocabulary, check.rounding_of(self.logps)
        if self.offsets is None:
            return Listed.of(self.ids[rows], self.logps[rows], *known)
        starts, counts = self.offsets[rows], self.offsets.diff()[rows]
        place = torch.arange(int(counts.max()) if len(rows) else 0, device=rows.device)
        index, used = starts[:, None] + place, place < counts[:, None]
        index = torch.where(used, index, 0)
        return Listed.of(torch.where(used, self.ids[index], -1), self.logps[index], *known)


def of_head(given: GivenTeacher, shape: torch.Size, columns: int, least: int | None) -> Teacher:
    """Hidden states [*shape, D], head [V, D], bias [V]. columns: of the student. least: V without padding, if said."""
    hidden, weight, bias = given.hidden, given.lm_head_weight, given.lm_head_bias
    check.head(hidden, weight, bias, ("teacher_hidden", "teacher_lm_head_weight", "teacher_lm_head_bias"), shape)
    if given.vocabulary is None:
        _check_vocabulary("teacher_lm_head_weight", len(weight), columns, least)
    return Teacher(
        hidden.detach().reshape(-1, hidden.shape[-1]), weight.detach(), None if bias is None else bias.detach()
    )


def of_logits(given: GivenTeacher, shape: torch.Size, columns: int, least: int | None) -> Teacher:
    """Logits [*shape, V]."""
    logits = given.logits
    check.tensor("teacher_logits", logits, "float")
    if logits.dim() != len(shape) + 1 or logits.shape[:-1] != shape:
        check.fail("teacher_logits", f"shape {list(logits.shape)}", f"[*, V] with tokens of shape {list(shape)}")
    if given.vocabulary is None:
        _check_vocabulary("teacher_logits", logits.shape[-1], columns, least)
    return Teacher(logits.detach().reshape(-1, logits.shape[-1]))


def mapping(vocabulary: Any, columns: int, most: int | None, device: torch.device, tp_group: Any) -> Tensor:
    """The teacher's ids for the student's, int64 [columns], -1 for none. most: how many the teacher has, if known."""
    check.tensor("teacher_vocabulary", vocabulary, "integer")
    if tp_group is not None:
        check.fail("teacher_vocabulary", "a mapping with tp_group", "None, or heads that are whole on every process")
    check.shape("teacher_vocabulary", vocabulary, (columns,), "[V], V of the student without padding,")
    check.device("teacher_vocabulary", vocabulary, device)
    ids = vocabulary.long()
    if not check.readable(ids):
        # unread where it is wrong, as a token id is
        return ids if most is None else torch.where((ids >= 0) & (ids < most), ids, -1)
    shared = ids[ids >= 0]
    wrong = (ids < -1) if most is None else (ids < -1) | (ids >= most)
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        wants = f"the teacher's ids{'' if most is None else f', below {most},'} or -1 where it has none"
        check.fail("teacher_vocabulary", f"{int(ids[at])} for id {at}", wants)
    if not len(shared):
        check.fail("teacher_vocabulary", "-1 for every id", "an id that both have at least")
    if len(shared.unique()) < len(shared):
        check.fail("teacher_vocabulary", "an id of the teacher twice", "each at most once")
    return ids


def _students(ids: Tensor, vocabulary: Tensor) -> Tensor:
    """A teacher's ids as the student's; -1 for those that it has not, which are left to the rest."""
    theirs, own = vocabulary.sort()
    at = torch.searchsorted(theirs, ids).clamp(max=len(theirs) - 1)
    return torch.where((ids >= 0) & (theirs[at] == ids), own[at], -1)


def _check_vocabulary(argument: str, got: int, columns: int, least: int | None) -> None:
    if least is None:
        if got != columns:
            wants = f"V = {columns}, the student's (or vocab_size, behind which both have padding)"
            check.fail(argument, f"a vocabulary of {got}", wants)
    elif got < least:
        check.fail(argument, f"a vocabulary of {got}", f"at least vocab_size, {least}")


def of_list(given: GivenTeacher, layout: Layout, shape: torch.Size, vocabulary: int) -> Teacher:
    """ids and logps [*shape, K], or packed [M] with offsets [N + 1]; looked at only at scored tokens."""
    ids, logps, offsets = given.ids, given.logps, given.offsets
    check.tensor("teacher_ids", ids, "integer")
    check.tensor("teacher_logps", logps, "float")
    device = layout.scored.device
    check.device("teacher_ids", ids, device)
    if offsets is None:
        if ids.dim() != len(shape) + 1 or ids.shape[:-1] != shape:
            wants = f"[*, K] with tokens of shape {list(shape)}, or [M] with teacher_offsets"
            check.fail("teacher_ids", f"shape {list(ids.shape)}", wants)
    else:
        _check_offsets(offsets, ids, layout)
        offsets = offsets.to(device=device, dtype=torch.int64)
    check.shape("teacher_logps", logps, ids.shape, "the shape of teacher_ids")
    check.device("teacher_logps", logps, device)
    ids, logps = ids.long(), logps.detach()
    if offsets is None:
        ids, logps = (x.flatten(0, -2) for x in (ids, logps))
    if given.vocabulary is not None:
        if check.readable(ids):
            # any id may be the teacher's
            _check_values(ids, logps, offsets, layout, int(ids.max()) + 1 if ids.numel() else 1)
        ids = _students(ids, given.vocabulary)
    elif check.readable(ids):
        _check_values(ids, logps, offsets, layout, vocabulary)
    else:
        # unread where it is wrong, as a token id is
        ids = torch.where((ids >= 0) & (ids < vocabulary), ids, -1)
    return Teacher(ids=ids, logps=logps, offsets=offsets)


def _check_offsets(offsets: Any, ids: Tensor, layout: Layout) -> None:
    check.tensor("teacher_offsets", offsets, "integer")
    if ids.dim() != 1:
        check.fail("teacher_ids", f"shape {list(ids.shape)} with teacher_offsets", "[M]")
    check.shape("teacher_offsets", offsets, (layout.tokens + 1,), "[N + 1]")
    if not check.readable(offsets):
        return
    if int(offsets[0]) != 0 or int(offsets[-1]) != len(ids) or bool((offsets.diff() < 0).any()):
        got = f"offsets from {int(offsets[0])} to {int(offsets[-1])}"
        check.fail("teacher_offsets", got, f"increasing ones from 0 to M = {len(ids)}")


def _check_values(ids: Tensor, logps: Tensor, offsets: Tensor | None, layout: Layout, vocabulary: int) -> None:
    """Ids in the vocabulary, none twice; log-probs of no more than everything."""
    if offsets is None:
        of_row = torch.arange(len(ids), device=ids.device).repeat_interleave(ids.shape[1])
    else:
        of_row = torch.arange(layout.tokens, device=ids.device).repeat_interleave(offsets.diff())
    rounding = check.rounding_of(logps)
    ids, logps = ids.reshape(-1), logps.reshape(-1).double()
    seen = layout.scored[of_row]

    def none(argument: str, wrong: Tensor, values: Tensor, wants: str) -> None:
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            check.fail(argument, f"{values[at].item()} at {layout.place(int(of_row[at]))}", wants)

    wants = f"ids in [0, V) with V = {vocabulary}, or -1 where unused"
    none("teacher_ids", seen & ((ids < -1) | (ids >= vocabulary)), ids, wants)
    used = seen & (ids >= 0)
    key, order = torch.where(used, of_row * vocabulary + ids, -1).sort()
    twice = torch.zeros_like(used)
    twice[order[1:]] = (key[1:] == key[:-1]) & (key[1:] >= 0)
    none("teacher_ids", twice, ids, "each id once")
    none("teacher_logps", used & ~(logps <= rounding), logps, "log-probs, numbers of at most 0")
    total = logps.new_zeros(layout.tokens).index_add_(0, of_row[used], logps[used].exp())
    over = (total > 1 + rounding).nonzero()
    if len(over):
        at = int(over[0])
        got = f"probabilities that add up to {float(total[at]):.6g} at {layout.place(at)}"
        check.fail("teacher_logps", got, "no more than 1")
