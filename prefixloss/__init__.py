"""First-error-masked policy losses for RL on language models, exact and paid for only by the tokens that learn."""

from prefixloss import advantages
from prefixloss._version import __version__
from prefixloss.config import LossConfig
from prefixloss.distill import DistillOutput, distill_loss, linear_distill_loss
from prefixloss.inputs.token_advantages import TokenAdvantages
from prefixloss.loss import LogpOutput, LossOutput, linear_logps, linear_prefix_loss, prefix_loss

__all__ = [
    "DistillOutput",
    "LogpOutput",
    "LossConfig",
    "LossOutput",
    "TokenAdvantages",
    "__version__",
    "advantages",
    "distill_loss",
    "linear_distill_loss",
    "linear_logps",
    "linear_prefix_loss",
    "prefix_loss",
]
