"""Programs: run against their tests, apart from everything else, and traced to the step that breaks them."""

from prefixloss.detect.code.detector import Code

__all__ = ["Code"]
