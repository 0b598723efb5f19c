"""Detectors: which step of a response is the first wrong one."""

from prefixloss.detect.base import Detector, FirstError

__all__ = ["Detector", "FirstError"]
