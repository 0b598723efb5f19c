"""`prefixloss.detect.models.judge` under the path that it had first."""

from prefixloss.detect.models.judge import Judge

__all__ = ["Judge"]
