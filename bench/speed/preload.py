"""What workers need, loaded once in the process that they are forked from: seconds less for each of them."""

import contextlib
import importlib
import os

from . import worker  # noqa: F401 (torch and the package)

MODULES = {
    "compiled": "torch._dynamo",
    "trl": "trl.kernels.chunked_logprob",
    "liger": "liger_kernel.chunked_loss",
    "cce": "cut_cross_entropy",
}

# the methods that will run, as the parent knows
for name in os.environ.get("PREFIXLOSS_BENCH_METHODS", "").split(","):
    with contextlib.suppress(Exception):  # a peer that is not there, or broken, says so in its own row
        importlib.import_module(MODULES.get(name, "torch"))
