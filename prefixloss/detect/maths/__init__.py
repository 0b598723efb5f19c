"""Arithmetic and algebra, read and checked step by step."""

from prefixloss.detect.maths.detector import Maths

__all__ = ["Maths"]
