"""A process that holds one method on one case and does as it is told.

Orders: "probe" (what machine this is and how fast it multiplies), "truth" (float64 answers, into a file), "load" (make
the inputs), "warm" (a first call: compiles, and peak memory), "errors" (against such a file), "turn" (timed calls).
Anything that fails is answered with {"error": ...}.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import statistics
import sys
import time
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from .cases import Case
from .clock import Clock
from .errors import Wrong, answer_of, inputs, truth_of
from .inputs import Linear, Logits, random_head
from .methods import METHODS
from .settings import credit_of, setting_of
from .step import Result, Step


class Worker:
    """One method on one case, in this process."""

    def __init__(self, order: dict[str, Any]) -> None:
        torch.set_num_threads(order["threads"])
        self.device = torch.device(order["device"])
        self.clock = Clock(self.device)
        self.case = Case.of(order["case"])
        self.method = METHODS[self.case.start].get(order["method"])
        if order.get("memory") and self.device.type == "cpu":
            # malloc then says no, where the kernel would kill
            resource.setrlimit(resource.RLIMIT_DATA, (order["memory"], resource.getrlimit(resource.RLIMIT_DATA)[1]))
        self.step: Step | None = None
        self.loss: torch.Tensor | None = None

    def probe(self, order: dict[str, Any]) -> dict[str, Any]:
        """Multiply-adds a second of one product in each dtype, and the machine's names."""
        speeds = {}
        for dtype in order["dtypes"]:
            a = torch.randn(1024, 1024, device=self.device, dtype=getattr(torch, dtype))
            b = torch.randn(8192, 1024, device=self.device, dtype=a.dtype)
            (a @ b.T)[0, 0].item()
            speeds[dtype] = 1024 * 1024 * 8192 / min(self.clock(lambda: a @ b.T)[0] for _ in range(3))  # noqa: B023
        return {"speeds": speeds, "machine": machine(self.device)}

    def truth(self, order: dict[str, Any]) -> dict[str, Any]:
        torch.save([truth_of(data) for data in inputs(self.case, self.device)], order["file"])
        return {}

    def load(self, _: dict[str, Any]) -> dict[str, Any]:
        assert self.method
        self.step = self.method.make(full_inputs(self.case, self.device))
        return {}

    def warm(self, _: dict[str, Any]) -> dict[str, Any]:
        """A first call, and its peak memory. One that compiles is called before that, the others on a tiny head."""
        assert self.method
        begun = time.monotonic()
        if self.method.compiles:
            self._call()
        else:
            tiny = self.method.make(tiny_inputs(self.case, self.device))
            tiny.start_again()
            tiny()
        compiled = time.monotonic()
        peak = self._peak()
        return {"warm_seconds": time.monotonic() - begun, "call_seconds": time.monotonic() - compiled, **peak}

    def errors(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self.method
        wrong = Wrong()
        truths = torch.load(order["file"])
        for data, truth in zip(inputs(self.case, self.device), truths, strict=True):
            step = self.method.make(data)
            found = {name: value.clone() for name, value in answer_of(step, data).items()}
            wrong.add(found, truth, answer_of(step, data))
        return {"errors": wrong.relative(), "repeats": wrong.repeats}

    def turn(self, order: dict[str, Any]) -> dict[str, Any]:
        """Seconds of forward and backward, medians over the turn, and a fingerprint of loss and gradients.

        Short calls are repeated, and the first is not counted: it gets back memory that others gave away.
        """
        until = time.monotonic() + order["turn_seconds"]
        calls = [self._call()]
        if time.monotonic() < until:
            calls = []
            while not calls or time.monotonic() < until:
                calls.append(self._call())
        forward, backward = (statistics.median(part) for part in zip(*calls, strict=True))
        both = statistics.median(map(sum, calls))
        bits = self._bits()
        return {"forward": forward, "backward": backward, "both": both, "calls": len(calls), "bits": bits}

    def _call(self) -> list[float]:
        """Seconds of forward and backward of one call, whose gradients and loss stay."""
        step = self.step
        assert step
        step.start_again()
        made: list[Result] = []

        def backward() -> None:
            step.backward(made[0])

        seconds = self.clock(lambda: made.append(step.forward()), backward)
        self.loss = None if made[0].loss is None else made[0].loss.detach()
        return seconds

    def _bits(self) -> list[int]:
        """Of the last call's loss and gradients: the sums of their bits as integers, which a change changes."""
        assert self.step
        values = [x for x in (self.loss, *(leaf.grad for leaf in self.step.leaves)) if x is not None]
        kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
        bits = [int(x.contiguous().view(kinds[x.element_size()]).sum(dtype=torch.int64)) for x in values]
        self.step.start_again()
        return bits

    def _peak(self) -> dict[str, Any]:
        """The most that one call holds above its inputs, gradients included, in bytes; and those gradients' bytes."""
        step = self.step
        assert step
        step.start_again()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step()
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
        else:
            if not (before_now := resident_before()):
                return {"peak_bytes": None, "gradient_bytes": None}
            step()
            peak = max(0, resident("VmHWM") - before_now)
        grads = [leaf.grad for leaf in step.leaves if leaf.grad is not None]
        apart = [g for g, leaf in zip(grads, step.leaves, strict=False) if g.data_ptr() != leaf.data_ptr()]
        step.start_again()
        return {"peak_bytes": peak, "gradient_bytes": sum(g.numel() * g.element_size() for g in apart)}


def full_inputs(case: Case, device: torch.device) -> Linear | Logits:
    dtype, setting = getattr(torch, case.dtype), setting_of(case.setting)
    credit = credit_of(case.tokens, setting)
    if case.start == "logits":
        responses = len(credit.lengths)
        shape = (responses, case.tokens // responses, case.head.vocabulary)
        return Logits(device, *shape, dtype=dtype, kl_coef=setting.kl_coef)
    weight = random_head(device, case.head.width, case.head.vocabulary, dtype)
    return Linear.of(weight, *credit, kl_coef=setting.kl_coef, softcap=case.head.softcap)


def tiny_inputs(case: Case, device: torch.device) -> Linear | Logits:
    """Of the case's kind, for a call that only loads libraries."""
    head = case.head._replace(width=min(32, case.head.width), vocabulary=min(512, case.head.vocabulary))
    return full_inputs(case._replace(head=head, tokens=64), device)


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def resident_before() -> int:
    """Resident bytes once what is free has gone back, with the high-water mark reset; 0 where Linux is not."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return resident("VmRSS")
    except (OSError, AttributeError):
        return 0


def machine(device: torch.device) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), cpu)
    found = {"device": device.type, "cpu": cpu, "cores": os.cpu_count(), "system": platform.platform()}
    found["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found["capability"] = torch.backends.cpu.get_cpu_capability()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return found


def serve(orders: Connection, errors: str) -> None:
    """Answers orders until they end. errors: the file that gets whatever is printed."""
    log = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    warnings.filterwarnings("ignore")
    worker: Worker | None = None
    while True:
        try:
            order = orders.recv()
        except EOFError:
            return
        try:
            worker = worker or Worker(order)
            orders.send(getattr(worker, order["do"])(order))
        except Exception as error:  # told to the parent, who writes it into the method's row
            traceback.print_exc()
            sys.stderr.flush()
            orders.send({"error": described(error), "memory": is_memory(error)})


def is_memory(error: Exception) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def described(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
