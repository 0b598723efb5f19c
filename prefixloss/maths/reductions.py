"""How the tokens' losses become one number: one line a reduction, which all code reads."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Reduction(NamedTuple):
    """mean_within: the tokens of each such unit are averaged first; None: they are added. per: what of the batch the
    sum is then divided by; None: 1. times_max_length: and by `LossConfig.max_length`. by_token: nothing is summed."""

    mean_within: Literal["response", "group"] | None
    per: Literal["tokens", "responses", "groups"] | None
    times_max_length: bool = False
    by_token: bool = False

    @property
    def per_response(self) -> bool:
        """Whether it has to be known which response a token is of."""
        return self.mean_within is not None or self.per in ("responses", "groups")

    @property
    def per_group(self) -> bool:
        """Whether it has to be known which group a response is of."""
        return self.mean_within == "group" or self.per == "groups"


BY_NAME = {
    "token-mean": Reduction(None, "tokens"),
    "group-token-mean": Reduction("group", "groups"),  # the paper's
    "seq-mean-token-mean": Reduction("response", "responses"),  # GRPO
    "seq-mean-token-sum": Reduction(None, "responses"),  # LUSPO
    "constant": Reduction(None, "responses", times_max_length=True),  # Dr. GRPO
    "none": Reduction(None, None, by_token=True),
}
