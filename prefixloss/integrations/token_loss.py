"""What trainers with log-probs and registries of their own share: the loss from log-probs, credit from plain rewards.

`prefixloss.backends.two_stages` holds the maths; here are the checks, the layout and the metrics of
`linear_prefix_loss`. With log-probs from `linear_logps` the model's gradient is that of `linear_prefix_loss`: the
backward there skips every token whose coefficient is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from prefixloss import advantages as credit
from prefixloss import check
from prefixloss.backends import two_stages
from prefixloss.config import LossConfig
from prefixloss.detect.choose import by_name
from prefixloss.inputs.batch import TokenInputs
from prefixloss.inputs.token_advantages import TokenAdvantages
from prefixloss.integrations.models.heads import SCALES, SOFTCAPS, unwrapped
from prefixloss.loss import linear_logps
from prefixloss.maths.metrics import metrics
from prefixloss.maths.precision import accumulation_dtype
from prefixloss.steps import Segmenter, step_tokens

# what a trainer of others' can have: those that need no more than outcomes and first errors, and use the latter
ESTIMATORS = tuple(name for name in credit.BY_NAME if credit.needs(name) <= {"first_error"} and credit.splits(name))


class PolicyLoss(NamedTuple):
    """loss: 0-d (shaped like `logps` for reduction="none"), differentiable. metrics: see `prefixloss.maths.metrics`."""

    loss: Tensor
    metrics: dict[str, Tensor]


def policy_loss(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor | TokenAdvantages,
    mask: Tensor | None,
    config: LossConfig,
    *,
    entropy: Tensor | None = None,
    sampler_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    group_ids: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> PolicyLoss:
    """The loss that `linear_prefix_loss` gives for tokens with these log-probs.

    logps: float [B, T], or [N] with `cu_seqlens`; values outside the mask are never read. entropy: like `logps`,
    needed by entropy_coef. Gradients reach both. The other arguments are those of `linear_prefix_loss`. Temperature,
    softcap and logit scale are already in the log-probs; kl="full" needs logits and is refused.
    """
    check.config(config, LossConfig)
    check.tensor("logps", logps, "float")
    check.rows("logps", logps)
    if config.exact_kl:
        check.fail("kl", "'full'", "'k1', 'k2' or 'k3': the exact KL needs logits, and these are log-probs")
    if entropy is not None:
        check.tensor("entropy", entropy, "float")
        check.shape("entropy", entropy, logps.shape, "the shape of logps")
    elif config.entropy_coef != 0:
        check.fail("entropy", "None", f"a value, since entropy_coef={config.entropy_coef!r}")
    # which token was sampled no longer matters: any id will do
    tokens = torch.zeros_like(logps, dtype=torch.int64)
    dtype = accumulation_dtype(logps)
    batch = TokenInputs(
        tokens, advantages, mask, cu_seqlens, old_logps, sampler_logps, ref_logps, group_ids, normalizer
    ).checked(config, dtype, 1, {})

    def statistics(needed: Tensor) -> two_stages.Statistics:
        def at(values: Tensor | None) -> Tensor:
            if values is None:
                return torch.zeros_like(batch.weights)
            return torch.where(needed, values.reshape(-1).to(dtype), 0.0)

        return two_stages.Statistics(at(logps), at(entropy), None)

    total, values = two_stages.loss(statistics, batch, config)
    return PolicyLoss(
        total.reshape(logps.shape) if config.reduction == "none" else total,
        metrics(config, batch, values, total.detach()),
    )


def clip_high(objective: str, epsilon: float) -> float:
    """`LossConfig.clip_high` for a trainer whose upper bound on the ratio is 1 + epsilon, whatever the objective.

    verl, SkyRL, slime and OpenRLHF mean that; TRL's epsilon_high is like ours, for "cispo" the bound itself.
    """
    return 1.0 + epsilon if objective == "cispo" else float(epsilon)


def shared_by_many(group: Any) -> Any:
    """A tensor-parallel group, or None where it has one process: the Triton back-end takes no group."""
    return None if group is None or torch.distributed.get_world_size(group) == 1 else group


def gradient_shared(hidden: Tensor, group: Any) -> Tensor:
    """`hidden`, of whose gradient each process of a tensor-parallel group gets a share that adds up to the whole.

    That is what Megatron wants of a head: under sequence parallelism it sums over the group behind it.
    """
    if group is None or not hidden.requires_grad:
        return hidden
    size = torch.distributed.get_world_size(group)
    hidden = hidden.view_as(hidden)
    hidden.register_hook(lambda grad: grad / size)
    return hidden


def logged(metrics: dict[str, Tensor]) -> dict[str, float]:
    """What trainers log of `prefixloss.maths.metrics`, as numbers, after one synchronisation."""
    shares = {
        "clip_ratio": metrics["clip_low"] + metrics["clip_high"],
        "learning_share": metrics["learning_tokens"] / metrics["scored_tokens"].clamp(min=1),
        "ratio_mean": metrics["ratio_mean"],
        "ratio_max": metrics["ratio_max"],
    }
    return dict(zip(shares, torch.stack([x.double() for x in shares.values()]).tolist(), strict=True))


def signed_score(correct: bool | None, first_error: int) -> float:
    """An outcome and a first error as the one number that a trainer's reward is.

    1 for a correct response; -(first_error + 1) for a wrong one, first_error being the 0-based index among the scored
    tokens of the first token of the first wrong step; 0 for a wrong one without a known first error (-1); first_error
    + 2 for a correct one that has a known first error all the same. NaN for None: the verifier gave no verdict.
    """
    if correct is None:
        return float("nan")
    return first_error + 2.0 if correct else -(first_error + 1.0)


def outcomes(scores: Tensor, flawed: bool = False) -> tuple[Tensor, Tensor]:
    """`correct` and `first_error` [B] of `prefixloss.advantages`, from signed scores, float [B].

    flawed: whether correct ones may have a first error. Raises ValueError for a score that is none: rewards with a KL
    penalty or shaping in them have lost the outcome.
    """
    scores = scores.detach().double()
    most = torch.inf if flawed else 1
    wrong = ((scores > 0) & ~((scores >= 1) & (scores <= most))) | (scores != scores.round()) | scores.isinf()
    if wrong.any():
        at = int(wrong.nonzero()[0])
        also = ", first_error + 2 (right, with an error)" if flawed else ""
        wants = f"1, 0 or -(first_error + 1){also}, nothing added to it"
        check.fail("scores", f"{scores[at]:g} for response {at}", wants)
    first_error = torch.where(scores < 0, -scores - 1, torch.where(scores > 1, scores - 2, -1))
    return scores >= 1, first_error.long()


def token_advantages(
    scores: Tensor, lengths: Tensor, group_labels: Any, estimator: str = "vppo", **options: Any
) -> TokenAdvantages:
    """Advantages from signed scores, float [B]. lengths: scored tokens, int64 [B]. group_labels: any B labels.

    A score of NaN is no verdict: that response gets 0 everywhere and is no part of its group's baseline.

    Right answers with a first error (see `signed_score`) need vppo's option `flawed`.

    estimator: one of `ESTIMATORS` ("neutral_prefix" is GRPO with 0 on good prefixes), with its options in
    `prefixloss.advantages`. Trainers do not hand over the prompts' lengths: `shorten` is 0 unless set.
    """
    estimator = credit.named("estimator", estimator, ESTIMATORS)
    judged = ~scores.isnan()
    correct, first_error = outcomes(torch.where(judged, scores, 0), options.get("flawed") is not None)
    first_error = torch.where(lengths > 0, first_error, -1)  # a response that a trainer has masked altogether
    numbers = np.unique(np.asarray(group_labels), return_inverse=True)[1]
    group_ids = torch.as_tensor(numbers, dtype=torch.int64, device=scores.device)
    outcome = credit.Outcome(correct, lengths, group_ids, first_error, judged=judged)
    defaults = {"shorten": 0} if estimator == "vppo" else {}
    made = credit.assign(estimator, outcome, **{**defaults, **options})
    assert isinstance(made, TokenAdvantages)
    return made


def first_error_of(
    tokenizer: Any,
    tokens: Sequence[int],
    problem: str,
    answer: str | None,
    detector: str = "auto",
    steps: Segmenter = "markers",
    threshold: float = 0.0,
) -> int:
    """The index of the first token of the first wrong step of a sampled response, -1 where the detector finds none.

    threshold: the confidence, from 0 to 1, below which a find counts as none.
    """
    check.number("threshold", threshold, 0.0, 1.0)
    texts, starts = step_tokens(tokenizer, tokens, steps)
    step = by_name(detector).detect(problem, texts, answer).at_least(threshold).step
    return -1 if step is None else starts[step]


def put(*places: tuple[Any, str, Any]) -> Callable[[], None]:
    """Sets (module or class, name, value) each; returns what sets back those that nobody has replaced since."""
    before = [(owner, name, getattr(owner, name), value) for owner, name, value in places]
    for owner, name, value in places:
        setattr(owner, name, value)

    def undo() -> None:
        for owner, name, old, value in before:
            if getattr(owner, name) is value:
                setattr(owner, name, old)

    return undo


@contextmanager
def head_of_logps(
    model: Any, tokens: Tensor, mask: Tensor, temperature: float = 1.0, entropy: bool = False
) -> Iterator[list[Tensor]]:
    """Within it the LM head of a transformers model returns log-probs, and entropies if asked, in place of logits.

    The model's "logits" are then float32 [B, T, 1] ([B, T, 2] with entropies): of `tokens` [B, T], tokens[b, t] being
    what position t predicts; 0 outside `mask`. The head is called where it always is, so that FSDP and ZeRO gather its
    weight, but nothing of [tokens, vocabulary] is made. What it returned is added to the list: a model that gives
    anything else as its logits has changed it (a softcap, a multiplier).
    """
    inner = unwrapped(model)
    head = inner.get_output_embeddings()
    changed = any(getattr(inner.config, name, None) not in (None, 1) for name in (*SOFTCAPS, *SCALES))
    if hasattr(head, "base_layer") or changed:
        check.fail("model", type(inner).__name__, "one whose logits are its head's, without an adapter on it")
    before = vars(head).get("forward")
    made: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        out = linear_logps(
            hidden,
            head.weight,
            tokens,
            mask=mask,
            lm_head_bias=getattr(head, "bias", None),
            temperature=temperature,
            entropy=entropy,
        )
        made.append(torch.stack([x for x in out if x is not None], -1))
        return made[-1]

    head.forward = forward
    try:
        yield made
    finally:
        del head.forward
        if before is not None:
            head.forward = before
