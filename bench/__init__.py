"""Benchmarks: every figure beside its floor, every ratio from one run. Installed as `prefixloss._bench`."""
