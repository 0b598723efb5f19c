"""What a call reports, against one token after the other."""

import math

import pytest
import torch

from prefixloss import LossConfig
from prefixloss.inputs.batch import Batch, Given, TokenValues
from prefixloss.inputs.layout import Layout
from prefixloss.maths.metrics import metrics

N = 40


def random_batch(seed: int, count: int, dtype: torch.dtype) -> tuple[Batch, TokenValues]:
    """Learning tokens are some of the computed ones, which are some of the scored ones."""
    generator = torch.Generator().manual_seed(seed)
    chance = torch.rand(3, count, generator=generator)
    scored, computed, learning = chance[0] < 0.8, chance.max(0).values < 0.8, chance.sum(0) < 1.2
    computed &= scored
    learning &= computed
    in_prefix = scored & (torch.rand(count, generator=generator) < 0.5)
    numbers = [torch.randn(count, generator=generator, dtype=dtype) for _ in range(6)]
    ratio = numbers[4].exp()
    values = TokenValues(*(torch.where(computed, x, 0.0) for x in (*numbers[:4], ratio)))
    given = Given(numbers[5], None, None, None)
    weights = scored.to(dtype)
    batch = Batch(
        Layout(scored, None), scored.long(), given, weights, weights.sum(), None, learning, computed, in_prefix
    )
    return batch, values


def one_by_one(batch: Batch, values: TokenValues) -> dict[str, float]:
    """clip_low = clip_high = 0.2."""

    def mean(x: list[float]) -> float:
        return math.fsum(x) / max(1, len(x)) if all(map(math.isfinite, x)) else sum(x) / len(x)

    def over(of: torch.Tensor, where: torch.Tensor) -> list[float]:
        return [float(x) for x, wanted in zip(of.double(), where, strict=True) if wanted]

    computed, learning, a, ratio = batch.computed, batch.learning, batch.given.advantages, values.ratio
    low = [x < 0 and r < 0.8 for x, r in zip(over(a, learning), over(ratio, learning), strict=True)]
    high = [x > 0 and r > 1.2 for x, r in zip(over(a, learning), over(ratio, learning), strict=True)]
    return {
        "scored_tokens": int(batch.layout.scored.sum()),
        "learning_tokens": int(learning.sum()),
        "prefix_tokens": int(batch.in_prefix.sum()),
        "loss": 7.0,
        "ratio_mean": mean(over(ratio, computed)),
        "ratio_max": max(over(ratio, computed), default=0.0),
        "clip_low": mean(low),
        "clip_high": mean(high),
        "kl": mean(over(values.kl, computed)),
        "entropy": mean(over(values.entropy, computed)),
        "logp_prefix": mean(over(values.logp, computed & batch.in_prefix)),
        "logp_suffix": mean(over(values.logp, computed & ~batch.in_prefix)),
    }


@pytest.mark.parametrize("count", [N, 1, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_metrics_are_those_of_the_tokens_one_by_one(dtype: torch.dtype, count: int) -> None:
    for seed in range(10):
        batch, values = random_batch(seed, count, dtype)
        got = metrics(LossConfig(), batch, values, torch.tensor(7.0, dtype=dtype))
        want = one_by_one(batch, values)
        assert list(got) == list(want)
        for name, value in want.items():
            assert got[name].dim() == 0
            assert got[name].dtype == (torch.int64 if name.endswith("_tokens") else dtype), name
            # a sum of 40 numbers of size 4, each addition rounded
            assert float(got[name]) == pytest.approx(value, abs=40 * 4 * torch.finfo(dtype).eps), name


@pytest.mark.slow
def test_inductor_compiles_them() -> None:
    """With as many tokens as fill a vector: its code for some operations on parts of a mask does not compile there."""
    torch._dynamo.reset()
    batch, values = random_batch(0, 64, torch.float32)

    def of(total: torch.Tensor) -> dict[str, torch.Tensor]:
        return metrics(LossConfig(), batch, values, total)

    total = torch.tensor(7.0)
    # sums of 64 numbers of size 4 in another order
    torch.testing.assert_close(torch.compile(of, fullgraph=True)(total), of(total), rtol=1e-5, atol=1e-5)


def test_a_token_of_no_probability_shows_only_where_it_lies() -> None:
    batch, values = random_batch(3, N, torch.float32)
    at = int((batch.computed & batch.in_prefix).nonzero()[0])
    values.logp[at] = -math.inf
    got = metrics(LossConfig(), batch, values, values.loss)
    assert got["logp_prefix"] == -math.inf
    assert got["logp_suffix"].isfinite()
    values.ratio[at] = math.nan
    got = metrics(LossConfig(), batch, values, values.loss)
    assert got["ratio_mean"].isnan()
    assert got["ratio_max"].isnan()
    # elsewhere than at computed tokens anything may stand
    values.ratio[at] = 1.0
    values.ratio[~batch.computed] = math.nan
    assert metrics(LossConfig(), batch, values, values.loss)["ratio_max"].isfinite()


def test_losses_of_tokens_are_their_mean_over_the_scored_ones() -> None:
    batch, values = random_batch(4, N, torch.float32)
    got = metrics(LossConfig(reduction="none"), batch, values, values.loss)["loss"]
    torch.testing.assert_close(got, values.loss.sum() / batch.layout.scored.sum())
