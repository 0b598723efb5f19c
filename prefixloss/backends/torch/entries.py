"""Below the floor: the few entries of a chunk's logit gradient that are worth a product.

What a tolerance means and costs: `prefixloss.backends.tolerance`.

Where so much survives that dense products are faster they are taken, and nothing is left out. Every sum has a fixed
order. Letters: n rows, V vocabulary, D hidden size, m entries.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from prefixloss.backends.columns import Columns
from prefixloss.backends.sparse import Entries
from prefixloss.backends.tolerance import MARGIN, smallest_usable
from prefixloss.maths.softmax import blocks, row_sums

# a product of single entries reads a row of the other matrix for each of them, at the pace of memory; a dense one takes
# this many times as many of them in the time of that and of the choice
_DENSE = 50
# entries above a first bound are looked at one by one, if they are no more than one in so many
_LOOKED_AT = 25
# one column in so many says where that bound may be
_GUESSED_BY = 64
# rows that say whether it is worth while to look at the others
_SAMPLE = 64


class Tolerance:
    """Chooses the entries of chunk after chunk, and knows what was left out.

    hidden, head: the two tolerances, 0 for a gradient that nobody wants. columns: where the vocabulary is split, every
    process leaves out of a row no more than its share of the columns may.
    """

    def __init__(self, hidden: float, head: float, columns: Columns) -> None:
        self.tolerances = hidden, head
        self.columns = columns
        self.left: list[Tensor] = []  # a chunk each, [3]: the squares left out for either product, and of all there is

    def split(self, gradient: Tensor) -> tuple[Entries | None, Entries | None]:
        """What gradient [n, V] has for the two products; None for the product of all of it."""
        smallest, largest = min((t for t in self.tolerances if t > 0), default=0.0), max(self.tolerances)
        # where processes share a vocabulary none of them may leave on its own
        alone = type(self.columns) is Columns
        if (
            smallest == 0
            or len(gradient) == 0
            or (alone and _looks_dense(gradient[:: -(-len(gradient) // _SAMPLE)], largest))
        ):
            return None, None
        squares = _squares(gradient)
        of_all = squares.sum()
        self.columns.sum_(of_all)
        share = self.columns.columns / self.columns.vocabulary
        mean = share * MARGIN * of_all.item() / len(gradient)
        left = of_all.new_zeros(3)
        left[2] = of_all
        self.left.append(left)
        # beside what is not finite nothing is small, and what is so small that its squares vanish is no measure
        usable = math.isfinite(mean) and smallest**2 * mean >= smallest_usable(gradient.shape[1], gradient.dtype)
        if not usable:
            return None, None
        made: dict[float, tuple[Entries, Tensor]] = {}
        above = _above(gradient, squares, smallest**2 * mean)
        if above is not None:
            sums = _Sums.of(*above)
            made = {t: sums.largest(t**2 * mean) for t in set(self.tolerances) if t > 0}
        chosen: list[Entries | None] = [None, None]
        for at, tolerance in enumerate(self.tolerances):
            if tolerance in made and len(made[tolerance][0].value) * _DENSE <= gradient.numel():
                chosen[at], left[at] = made[tolerance]
        return chosen[0], chosen[1]

    def left_out(self) -> float:
        """|dG| / |G|, the largest of the chunks and of the two products."""
        if not self.left:
            return 0.0
        left = torch.stack(self.left)
        out = left[:, :2].contiguous()
        self.columns.sum_(out)
        return float((out / left[:, 2:]).nan_to_num(0.0).max().sqrt())


def _squares(gradient: Tensor) -> Tensor:
    """The squares of each row, float64 [n]."""
    norms = gradient.new_empty(len(gradient))
    for rows in blocks(*gradient.shape):
        torch.linalg.vector_norm(gradient[rows], dim=1, out=norms[rows])
    return norms.double().square_()


def _guess(sizes: Tensor, budget: float) -> Tensor:
    """[n, 1]: the squares of a row's entries below it are most likely, and just, within the budget."""
    root = math.sqrt(budget)
    some = torch.nn.functional.pad(sizes[:, ::_GUESSED_BY].sort(1).values, (0, 1), value=root)
    within = some[:, :-1].square().cumsum_(1).mul_(1.5 * _GUESSED_BY) <= budget
    return some.gather(1, within.sum(1, keepdim=True)).clamp_(root / math.sqrt(sizes.shape[1]), root)


def _bound(sizes: Tensor, budget: float) -> Tensor:
    """[n, 1], for the sizes [n, V] of entries: the squares of a row's entries below its bound are within the budget.

    No entry above the root of the budget can leave. The squares of the others that lie below a bound add up to no more
    than the bound times the sum of their sizes, and to no more than V times the bound's own square.
    """
    root = math.sqrt(budget)
    tail = row_sums(sizes.masked_fill(sizes > root, 0))
    return (budget / tail).clamp(root / math.sqrt(sizes.shape[1]), root)


def _looks_dense(rows: Tensor, tolerance: float) -> bool:
    """Whether so much of a sample of rows survives that it is not worth while to look at the others."""
    above, many = 0, rows.numel() // _LOOKED_AT
    budget = tolerance**2 * _squares(rows).mean().item()
    for some in blocks(*rows.shape):
        sizes = rows[some].abs()
        above += int((sizes >= _guess(sizes, budget)).sum())
    return above > many


def _above(gradient: Tensor, squares: Tensor, budget: float) -> tuple[Entries, Tensor] | None:
    """The entries above a bound that surely keeps the budget, and the squares of the others, a sum for each row; None
    if there are too many of them."""
    rest, parts, count = squares.clone(), [Entries.none(gradient)], 0
    # a row that is within the budget as a whole leaves with all it has
    for rows in (squares > budget).nonzero().squeeze(1).split(next(blocks(*gradient.shape)).stop):
        row, column, rest[rows] = _split(gradient[rows], budget)
        count += len(row)
        if count * _LOOKED_AT > gradient.numel():
            return None
        parts.append(Entries(rows[row], column, gradient[rows[row], column]))
    return Entries.joined(parts), rest


def _split(gradient: Tensor, budget: float) -> tuple[Tensor, Tensor, Tensor]:
    """Which entries of gradient [n, V] are above a bound: row and column of each, int64 [m]; and the squares of the
    others, [n], within the budget."""
    sizes = gradient.abs()
    # whole words of eight
    above = torch.zeros(len(sizes), -(-sizes.shape[1] // 8) * 8, dtype=torch.bool, device=sizes.device)
    here = above[:, : sizes.shape[1]]
    torch.ge(sizes, _guess(sizes, budget), out=here)
    row, column = _places(above)
    below = _squares(sizes.index_put_((row, column), sizes.new_zeros(())))
    missed = (below > budget).nonzero().squeeze(1)
    if len(missed):
        again = gradient[missed].abs_()
        here[missed] = surely = again >= _bound(again, budget)
        below[missed] = _squares(again.masked_fill_(surely, 0))
        row, column = _places(above)
    return row, column, below


def _places(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column, int64 [m], of what is set in mask [n, V], of which it is little; V is a multiple of 8."""
    row, word = mask.view(torch.int64).nonzero().unbind(1)
    at, byte = mask.view(len(mask), mask.shape[1] // 8, 8)[row, word].nonzero().unbind(1)
    return row[at], word[at] * 8 + byte


class _Sums(NamedTuple):
    """Entries, and in the `order` of their rows and there of their sizes, the smallest first: their squares, float64
    [m]; `first`: where each row of them begins, and the squares of the `rest` of it, [n]."""

    entries: Entries
    order: Tensor
    squares: Tensor
    first: Tensor
    rest: Tensor

    @classmethod
    def of(cls, entries: Entries, rest: Tensor) -> _Sums:
        # the bits of numbers that are not negative have their order, and whole numbers are sorted several times faster
        size = entries.value.abs().float().view(torch.int32)
        order = torch.sort(entries.row * 2**32 + size, stable=True).indices
        first = torch.searchsorted(entries.row, torch.arange(len(rest), device=rest.device))
        return cls(entries, order, entries.value[order].double().square_(), first, rest)

    def largest(self, budget: float) -> tuple[Entries, Tensor]:
        """Without the smallest entries of each row, as many as with the `rest` of the row stay within the budget; and
        the squares of all that is left out."""
        # one above the budget stays in any case: within a sum over all rows it would cost the small ones their digits
        leaves = self.squares <= budget
        up_to = torch.where(leaves, self.squares, 0.0).cumsum(0)
        before = torch.nn.functional.pad(up_to, (1, 0))[self.first]
        leaves &= up_to + (self.rest - before)[self.entries.row] <= budget
        stays = torch.empty_like(leaves)
        stays[self.order] = ~leaves
        return self.entries.where(stays), self.rest.sum() + self.squares[leaves].sum()
