"""What of a failure is the sandbox's own limit, not the program's fault: then nothing can be said.

A program may raise any exception itself, so its type alone says nothing. Believed is

- what the kernel told the sandbox in this run: a refused system call, a read from the empty standard input;
- a module that the program's or a test's text imports, that is no part of Python, and that is named as missing;
- an operating system's refusal or a lack of memory, threads, files or disk, where the program's line that it came from
  holds no `raise`, and the code that raised it is a file of Python's or the program's text itself.

The text is read before the program runs, so nothing that it does then changes the second and the third. A program can
still run into a limit on purpose. It gains nothing by that: "cannot tell" is no praise.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import NamedTuple

from prefixloss.detect.code.sandbox import Execution, Result

_OUT_OF = {errno.ENOMEM, errno.EAGAIN, errno.ENOSPC, errno.EMFILE, errno.EFBIG}
_REFUSED = {errno.EPERM, errno.EACCES, errno.EROFS}
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ENOSYS}
_MEMORY = "needs more memory, threads, files or disk than the sandbox gives"
_REFUSES = "asks for what the sandbox refuses"
_INPUT = "asks for input"


class ProgramText(NamedTuple):
    """What the outline knows of a program. file: its name in tracebacks. raising: the lines of its `raise` statements.
    modules: what it and its tests import, without what follows the first point."""

    file: str
    raising: frozenset[int]
    modules: frozenset[str]


def limit_met(failure: Result, run: Execution, text: ProgramText) -> str | None:
    """The sandbox's limit that a failure may come from; None where it is the program's own."""
    if failure.error == "unpassable":
        return f"a test cannot be judged: {failure.message}"
    if (failure.error, failure.message) == ("died", "wrote too much"):
        return "writes more than the sandbox takes"
    for kind, detail, _ in failure.claims:
        name = detail.split(".")[0]
        if kind == "module" and name in text.modules and name not in sys.stdlib_module_names:
            return f"needs the module {detail}"
    if run.refused is not None and run.refused:
        return _INPUT if run.refused == {"input"} else _REFUSES
    lines = [line for file, line in failure.places if file == text.file]
    if lines and lines[-1] in text.raising:
        return None
    reasons = (_reason(*claim, watched=run.refused is not None) for claim in failure.claims if _is_real(claim[2], text))
    return next((reason for reason in reasons if reason), None)


def _is_real(file: str, text: ProgramText) -> bool:
    """Whether the frame that raised is the program's text, which is known, or Python's."""
    return file in (text.file, "<test>") or file.startswith(("/", "<frozen "))


def _reason(  # noqa: PLR0911  # one line a kind of limit
    kind: str, detail: str, file: str, *, watched: bool
) -> str | None:
    """watched: the kernel tells of refused calls and of reads from the standard input."""
    if kind in ("memory", "thread"):
        return _MEMORY
    if kind == "input":
        return _INPUT if not watched and detail.startswith("EOF when reading") else None
    if kind != "os":
        return None
    number, _, path = detail.partition(":")
    code = int(number) if number.isdecimal() else 0
    if code in _OUT_OF:
        return _MEMORY
    if code in _REFUSED or (code in _ABSENT and f"{os.sep}multiprocessing{os.sep}" in file):
        return _REFUSES
    if code in _ABSENT and os.path.isabs(path) and "\0" not in path and os.path.lexists(path):
        return f"asks for a file outside the sandbox: {path}"
    return None
