"""The ways to compute a loss: the method in its plainest form, plain torch, and Triton kernels."""
