"""Advantages from a value head, and that head's loss."""

from __future__ import annotations

import torch
from torch import Tensor

from prefixloss import check
from prefixloss.inputs.layout import Layout


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
    first_error: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of each token, float32, shaped like `values`: GAE (arXiv 1506.02438).

    A_t = d_t + gamma lam A_{t+1}, d_t = r_t + gamma V_{t+1} - V_t, the return A_t + V_t; behind a response's last token
    V and A are 0. Tokens outside the mask (a tool's) are skipped as if they were not there, and get 0.

    rewards: [B], earned at a response's last scored token, or a reward a token, like `values`.
    values: float [B, T], or [N] with cu_seqlens [B + 1]: V before each token is written.
    first_error: int64 [B], the index among scored tokens of the first wrong step's first token, -1 for none. A reward
        of [B] is then earned there, in responses that have one.
    """
    check.tensor("values", values, "float")
    check.rows("values", values)
    gamma, lam = check.number("gamma", gamma, 0.0, 1.0), check.number("lam", lam, 0.0, 1.0)
    layout = Layout.of(values.shape, values.device, mask, cu_seqlens)
    v = values.detach().reshape(-1).double()
    layout.check_finite(values=v)
    r = _by_token(rewards, values, layout, first_error)
    layout.check_finite(rewards=r)
    response, rank = layout.response_of_token("values"), layout.rank()
    lengths = layout.lengths("values")
    width = int(lengths.max()) if len(lengths) else 0

    def tight(x: Tensor) -> Tensor:
        """The scored tokens alone, [B, width], 0 behind them."""
        at = (response[layout.scored], rank[layout.scored])
        return x.new_zeros(len(lengths), width).index_put(at, x[layout.scored])

    v_tight, r_tight = tight(v), tight(r)
    a, made = v.new_zeros(len(lengths)), []
    for t in reversed(range(width)):
        following = v_tight[:, t + 1] if t + 1 < width else torch.zeros_like(a)
        a = r_tight[:, t] + gamma * following - v_tight[:, t] + gamma * lam * a
        made.append(a)
    padded = torch.stack(made[::-1], 1) if made else v_tight
    out = torch.zeros_like(v)
    out[layout.scored] = padded[response[layout.scored], rank[layout.scored]]
    returns = torch.where(layout.scored, out + v, 0.0)
    return out.float().reshape(values.shape), returns.float().reshape(values.shape)


def _by_token(rewards: Tensor, values: Tensor, layout: Layout, first_error: Tensor | None) -> Tensor:
    """float64 [N]."""
    check.tensor("rewards", rewards, "number")
    check.device("rewards", rewards, values.device)
    if rewards.shape == values.shape and rewards.shape != (layout.responses("rewards"),):
        if first_error is not None:
            check.fail("first_error", "a value with a reward a token", "None, or rewards [B]")
        return rewards.detach().reshape(-1).double()
    check.shape("rewards", rewards, (layout.responses("rewards"),), "[B], or the shape of values")
    lengths = layout.lengths("rewards")
    place = lengths - 1
    if first_error is not None:
        check.responses(lengths=lengths, first_error=first_error)
        place = torch.where(first_error >= 0, first_error, place)
    response = layout.response_of_token("rewards")
    there = layout.scored & (layout.rank() == place[response])
    return torch.where(there, rewards.detach().double()[response], 0.0)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    *,
    mask: Tensor | None = None,
    clip: float | None = 0.2,
) -> Tensor:
    """Mean over the scored tokens of max((V - R)^2, (V_c - R)^2) / 2, V_c = V held within `clip` of V_old.

    PPO's loss of a value head, as in the code of arXiv 1707.06347. 0-d, differentiable in values. clip=None: no V_c.

    values, old_values, returns: float [B, T] or [N]; mask: bool or 0/1 like them, None scores every token.
    """
    for name, x in (("values", values), ("old_values", old_values), ("returns", returns)):
        check.tensor(name, x, "float")
        check.shape(name, x, values.shape, "the shape of values")
        check.device(name, x, values.device)
    check.rows("values", values)
    scored = Layout.of(values.shape, values.device, mask, None).scored
    v, old, target = (torch.where(scored, x.reshape(-1), 0.0).float() for x in (values, old_values, returns))
    old, target = old.detach(), target.detach()
    error = (v - target) ** 2
    if clip is not None:
        bound = check.number("clip", clip, 0.0)
        error = torch.maximum(error, (old + (v - old).clamp(-bound, bound) - target) ** 2)
    return error.sum() / 2 / scored.sum().clamp(min=1)
