"""TRL 1.9 to 1.16: our log-probs under its own trainers, and a GRPO trainer that knows where a response goes wrong."""

from prefixloss.integrations.trl.versions import check_version

check_version()  # before an import of TRL can fail in words of its own

from prefixloss.integrations.trl.logps import LogProbs, patch_trl  # noqa: E402
from prefixloss.integrations.trl.trainer import PrefixGRPOTrainer  # noqa: E402

__all__ = ["LogProbs", "PrefixGRPOTrainer", "patch_trl"]
