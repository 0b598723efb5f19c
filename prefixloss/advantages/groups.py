"""Means and standard deviations over the responses of a group, and the checks of what they are made from."""

from __future__ import annotations

import torch
from torch import Tensor

from prefixloss import check
from prefixloss.inputs.token_advantages import TokenAdvantages

# of float64, in which means are taken
_EPS = torch.finfo(torch.float64).eps
# roundings by which rewards of equal value may differ: a sum of two products of rounded numbers has about as many
_ROUNDINGS = 4


class Groups:
    """Sums over the judged responses of each group, given back per response."""

    def __init__(self, group_ids: Tensor, judged: Tensor | None) -> None:
        labels, self.index = torch.unique(group_ids, return_inverse=True)
        self.order = torch.argsort(self.index, stable=True)
        self.counts = torch.bincount(self.index, minlength=len(labels))
        self.judged = torch.ones_like(group_ids, dtype=torch.bool) if judged is None else judged
        self.sizes = self.sum(self.judged).clamp(min=1)

    def _reduced(self, values: Tensor, how: str) -> Tensor:
        """In a fixed order on every device, in float64."""
        values = torch.where(self.judged, values.double(), 0.0)[self.order]
        return torch.segment_reduce(values, how, lengths=self.counts, unsafe=True)[self.index]

    def sum(self, values: Tensor) -> Tensor:
        return self._reduced(values, "sum")

    def largest(self, values: Tensor) -> Tensor:
        """Of |values|."""
        return self._reduced(values.abs(), "max")

    def mean(self, values: Tensor) -> Tensor:
        return self.sum(values) / self.sizes

    def less(self, values: Tensor, baseline: Tensor, size: Tensor) -> Tensor:
        """values - baseline, exactly 0 where they are equal but for the rounding of a mean of numbers up to `size`."""
        difference = values - baseline
        known = _ROUNDINGS * _EPS * self.sizes * self.largest(size)
        return torch.where(difference.abs() <= known, 0.0, difference)

    def deviations(self, values: Tensor, rounding: Tensor) -> Tensor:
        """values - mean; exactly 0 where they are equal but for rounding, which is no signal.

        rounding: how much one rounding may change each value. A single value may be off by that, and so may their mean,
        to which a float64 sum adds one rounding a response. Where a whole group lies within a few roundings, its values
        are equal numbers that were summed in different orders.
        """
        deviations = values.double() - self.mean(values)
        known = self.largest(rounding + self.sizes * _EPS * values.double().abs())
        equal = (deviations.abs() <= known) | (self.largest(deviations) <= _ROUNDINGS * known)
        # an infinite reward that nobody looked at makes nothing equal
        return torch.where((equal & (known < torch.inf)) | ~self.judged, 0.0, deviations)

    def spread(self, deviations: Tensor) -> Tensor:
        """The standard deviation. In units of the largest deviation: squares of small ones would be 0."""
        unit = self.largest(deviations)
        unit = torch.where(unit == 0, 1.0, unit)
        return unit * (self.sum((deviations / unit) ** 2) / (self.sizes - 1).clamp(min=1)).sqrt()

    def standardised(self, values: Tensor, rounding: Tensor, std: bool, std_floor: float) -> Tensor:
        """(values - mean) / max(std, std_floor), or without the division, float32 [B]."""
        deviations = self.deviations(values, rounding)
        return (over_std(deviations, self.spread(deviations), std_floor) if std else deviations).float()

    def token_advantages(self, prefix: Tensor, suffix: Tensor, prefix_lengths: Tensor) -> TokenAdvantages:
        prefix, suffix = (torch.where(self.judged, x, 0.0).float() for x in (prefix, suffix))
        return TokenAdvantages(prefix, suffix, prefix_lengths.long())


def rounding_of(values: Tensor) -> Tensor:
    """float64 [B]: the distance from each value to the next that its dtype has (float64 for whole numbers)."""
    dtype = torch.finfo(values.dtype if values.is_floating_point() else torch.float64)
    return dtype.eps * values.double().abs().clamp(min=dtype.tiny)


def over_std(values: Tensor, std: Tensor, floor: float = 0.0) -> Tensor:
    """0 for a standard deviation of 0; one that is NaN, of rewards that nobody could look at, stays NaN."""
    return torch.where(std == 0, 0.0, values / torch.where(std == 0, 1.0, std).clamp(min=floor))


def checked_floor(std: bool, std_floor: float) -> float:
    """The least standard deviation to divide by, checked along with whether one divides at all."""
    check.flag("std", std)
    floor = check.number("std_floor", std_floor, 0.0)
    if floor > 0 and not std:
        check.fail("std_floor", f"{std_floor!r} with std=False", "0, since nothing is divided")
    return floor


def checked(judged: Tensor | None, **given: Tensor) -> list[Tensor]:
    """The arguments, checked, with "wrong, no error known, of no length and no worth" where nothing is judged."""
    check.responses(judged, **given)
    if judged is None:
        return list(given.values())
    return [
        torch.where(judged, value, -1 if name == "first_error" else 0).to(value.dtype) for name, value in given.items()
    ]
