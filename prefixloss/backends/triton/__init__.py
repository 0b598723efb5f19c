"""backend="triton": what launches the kernels of `prefixloss._kernels`."""
