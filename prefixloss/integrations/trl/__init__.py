"""TRL 1.16: our log-probs under its own trainers, and a GRPO trainer that knows where a response goes wrong."""

from prefixloss.integrations.trl.logps import LogProbs, patch_trl
from prefixloss.integrations.trl.trainer import PrefixGRPOTrainer

__all__ = ["LogProbs", "PrefixGRPOTrainer", "patch_trl"]
