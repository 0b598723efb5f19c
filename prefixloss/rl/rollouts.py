"""Sampled responses, and what is known of them once they are checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Sampled:
    """B sampled responses: prompts padded on the left to width P, responses on the right to T.

    ids, attention: int64 [B, P + T]. mask: bool [B, T], the response with its end token. finished: bool [B], False for
    responses cut off by the length limit. texts: the responses without special tokens. logps: float [B, T], the
    sampler's own log-probs, where it is another program than the policy's.
    """

    ids: Tensor
    attention: Tensor
    mask: Tensor
    finished: Tensor
    texts: list[str]
    logps: Tensor | None = None

    @property
    def tokens(self) -> Tensor:
        """int64 [B, T]."""
        return self.ids[:, -self.mask.shape[1] :]

    @property
    def prompt_lengths(self) -> Tensor:
        """int64 [B]."""
        return self.attention.sum(1) - self.mask.sum(1)

    def rows(self, rows: Tensor) -> Sampled:
        texts = [self.texts[i] for i in rows.tolist()]
        logps = None if self.logps is None else self.logps[rows]
        return Sampled(self.ids[rows], self.attention[rows], self.mask[rows], self.finished[rows], texts, logps)

    def with_logps(self, logps: Tensor) -> Sampled:
        return replace(self, logps=logps)


@dataclass(frozen=True)
class Checked:
    """What the checker says of B responses: bool [B], and int64 [B] otherwise; first_error is -1 where not found.

    reasons: for each response what is wrong with its first wrong step, or an empty text.
    """

    correct: Tensor
    first_error: Tensor
    right_steps: Tensor
    total_steps: Tensor
    reasons: Sequence[str] = ()
