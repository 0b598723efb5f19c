"""A call's options and tensors as the kernels take them, and the launches that solve it.

Letters: N tokens, V vocabulary. stats [7, N] and terms [6, N], float32: see `STATS` and `TERMS` in
`prefixloss._kernels.problem`. given: float32 [5, N], see `TokenInputs` in `prefixloss._kernels.objective`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prefixloss._kernels import launch, rows, tune
from prefixloss._kernels.objective import CORRECTIONS, DIVERGENCES, POLICIES, ObjectiveKind, Options
from prefixloss._kernels.problem import LEARNING, STATS, TERMS, Problem, Tokens, Work
from prefixloss._kernels.softmax import LogitScaling
from prefixloss.config import LossConfig
from prefixloss.inputs.batch import Given
from prefixloss.maths.objective import Terms, token_terms
from prefixloss.maths.softmax import Coefficients, RowStats, live_rows, transform_of


def in_kernels(config: LossConfig) -> bool:
    """Whether the kernels know what a token's loss is; if not, torch makes it from their statistics."""
    known = config.objective in POLICIES and config.sampler_correction in (None, *CORRECTIONS)
    plain = config.sampler_missing is None and config.kl_clamp is None
    return known and plain and config.kl in (None, *DIVERGENCES)


def device_transform(config: LossConfig) -> LogitScaling:
    slope = config.logit_scale / config.temperature
    if config.softcap is None:
        return LogitScaling(1.0, 1.0, float(slope), float(slope))
    return LogitScaling(*map(float, (config.logit_scale, config.softcap, 1 / config.temperature, slope)))


def objective_of(config: LossConfig, off_policy: bool) -> tuple[ObjectiveKind, Options]:
    kind = ObjectiveKind(
        policy=config.objective if isinstance(config.objective, str) else "",
        off_policy=off_policy,
        ratio_cap=config.ratio_cap is not None,
        dual_clip=config.dual_clip is not None,
        sampler=config.sampler_correction or "",
        kl=config.kl or "",
        kl_penalty=config.penalises_kl,
        kl_importance=config.kl_importance,
        entropy_bonus=config.entropy_coef != 0,
    )
    # "cispo" caps the ratio itself at clip_high
    high = config.clip_high if config.objective == "cispo" else 1 + config.clip_high
    options = Options(
        clip_low=1 - config.clip_low,
        clip_high=high,
        ratio_cap=config.ratio_cap or 0.0,
        dual_clip=config.dual_clip or 0.0,
        tau_positive=config.sapo_tau[0],
        tau_other=config.sapo_tau[1],
        sampler_low=config.sampler_bounds[0],
        sampler_high=config.sampler_bounds[1],
        kl_coef=config.kl_coef,
        entropy_coef=config.entropy_coef,
    )
    return kind, Options(*map(float, options))


def problem_of(
    config: LossConfig,
    logits: Tensor,
    ref: Tensor | None,
    tokens: Tokens,
    off_policy: bool,
    grads: torch.dtype,
    **work: Any,
) -> Problem:
    kind, options = objective_of(config, off_policy)
    ref = ref if config.exact_kl else None
    dtypes = (logits.dtype, grads) if ref is None else (logits.dtype, ref.dtype, grads)
    vector = launch.vector_of(*dtypes)
    strides = [x.stride()[:-1] for x in (logits, ref) if x is not None]
    if not (indexed := work.get("indexed", False)):
        strides.append(torch.empty(logits.shape, device="meta").stride()[:-1])  # of a new gradient
    aligned = all(stride % vector == 0 for each in strides for stride in each)
    starts = {
        tuple(stride % vector for stride, size in zip(each, logits.shape[:-1], strict=True) if size > 1)
        for each in strides
    }
    # which lane sums a column then depends on where in the batch its row lies
    peeled = not aligned and not indexed and len(starts) == 1 and config.chunk_tokens is None
    penalty = config.entropy_coef != 0 or config.follows_exact_kl
    given: dict[str, Any] = {
        "aligned": aligned,
        "peeled": peeled,
        "softcap": config.softcap is not None,
        "reference": ref is not None,
        "penalty": penalty,
    }
    problem = Problem(
        logits,
        logits if ref is None else ref,
        tokens,
        device_transform(config),
        options,
        Work(**{**given, **work}),
        kind,
        launch.launch_for(logits.shape[-1], *dtypes, heavy=ref is not None, aligned=aligned or peeled),
    )
    return replace(problem, launch=tune.best_launch(problem, grads)) if tune.wanted() else problem


def run(problem: Problem, stats: Tensor, terms: Tensor, grads: Tensor, scales: Tensor, splits: int) -> None:
    """Statistics and, as the problem's work says, terms and gradient: in one launch, or several programs a row."""
    if problem.rows == 0:
        return
    if splits == 1:
        rows.launch_rows(problem, stats, terms, grads, scales)
        return
    sums = stats.new_empty(6, problem.rows, splits)
    rows.launch_slices(problem, sums)
    rows.launch_combine(problem, sums, stats, terms)
    if problem.work.gradient:
        rows.launch_gradient(problem, stats, terms[3:], grads, scales, splits)


def splits_of_logits(problem: Problem, config: LossConfig) -> int:
    """By the rows that there are; with chunk_tokens by those of a chunk, so that no row's bits depend on the batch."""
    return splits_of(problem, config.chunk_tokens or problem.rows)


def splits_of(problem: Problem, programs: int) -> int:
    return launch.splits_for(programs, problem.vocabulary, problem.launch.block, problem.logits.device)


def rooms(given: Tensor) -> tuple[Tensor, Tensor]:
    """stats and terms of no token yet."""
    count = given.shape[1]
    return given.new_zeros(len(STATS), count), given.new_zeros(len(TERMS), count)


def put_terms(
    config: LossConfig, stats: Tensor, terms: Tensor, given: Tensor, recorded: list[bool], flags: Tensor, rows: Tensor
) -> None:
    """Writes the terms of the tokens `rows` [n], where no kernel knows the loss; as they do, 0 where not computed, and
    coefficients with the token's weight. recorded: which of the log-probs in given there are."""
    seen, learning = flags[rows] != 0, (flags[rows] & LEARNING.value) != 0

    def made(of: Tensor, derivatives: bool) -> Terms:
        """Of some of these tokens; what is known of the others may be anything, and is 0 here."""
        advantages, _, *logps = torch.where(of, given[:, rows], 0.0)
        logp, entropy, kl = torch.where(of, stats[:3, rows], 0.0)
        tokens = Given(advantages, *(x if there else None for x, there in zip(logps, recorded, strict=True)))
        return token_terms(config, tokens, logp, entropy, kl if config.exact_kl else None, derivatives=derivatives)

    shown, learned, weight = made(seen, False), made(learning, True), given[1, rows]
    slopes = (learned.d_logp, learned.d_entropy, learned.d_kl)
    coefficients = [torch.zeros_like(weight) if x is None else x * weight for x in slopes]
    terms[:3, rows] = torch.where(seen, torch.stack([shown.loss, shown.ratio, shown.kl]), 0.0)
    terms[3:, rows] = torch.where(learning, torch.stack(coefficients), 0.0)


def total_of(terms: Tensor, given: Tensor, flags: Tensor, most: int) -> Tensor:
    """The reduced loss; NaN if more tokens were wanted than `most`, which nothing could report without waiting."""
    total = torch.where(flags != 0, terms[0] * given[1], 0.0).sum()
    return total if most < 0 else torch.where((flags != 0).sum() > most, torch.nan, total)


def no_stats(ids: Tensor) -> Tensor:
    return torch.zeros(len(STATS), ids.shape[0], device=ids.device)


def live_coefficients(config: LossConfig, flags: Tensor, stats: Tensor, grad: Tensor) -> Tensor:
    """The incoming gradients of log-prob, entropy and KL, [3, N]; 0 for rows that `row_tolerance` drops and for those
    that were not computed."""
    coefficients = torch.where(flags != 0, grad[:3], 0.0)
    if config.row_tolerance == 0:
        return coefficients
    transform = device_transform(config)
    by_name = RowStats(
        logp=stats[0],
        lse=stats[3] * transform.kappa + torch.log(stats[4].where(stats[4] > 0, 1.0)),
        total=torch.ones_like(stats[4]),
        entropy=stats[1],
        kl=stats[2],
        ref_lse=None,
    )
    cap = transform_of(config)
    live = live_rows(Coefficients(*coefficients), by_name, cap, config.row_tolerance)
    return torch.where(live, coefficients, 0.0)
