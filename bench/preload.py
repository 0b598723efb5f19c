"""What every worker needs, loaded once in the process that they are forked from: seconds less for each of them."""

import contextlib
import importlib

from . import worker  # noqa: F401 (torch and the package)

for name in ("trl.kernels.chunked_logprob", "liger_kernel.chunked_loss", "cut_cross_entropy", "torch._dynamo"):
    with contextlib.suppress(Exception):  # a peer that is not there, or broken, says so in its own row
        importlib.import_module(name)
