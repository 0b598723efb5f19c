"""Benchmarks: every figure beside its floor, every ratio from one run."""
