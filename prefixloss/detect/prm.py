"""`prefixloss.detect.models.prm` under the path that it had first."""

from prefixloss.detect.models.prm import PRM

__all__ = ["PRM"]
