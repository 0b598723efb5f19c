"""The benchmark's file: what is in it, reading it back, and the machine and versions that made it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

SCHEMA = 1
PACKAGES = (
    "prefixloss", "torch", "triton", "numpy", "trl", "liger-kernel", "cut-cross-entropy", "transformers"
)  # fmt: skip
STATUSES = ("ok", "not installed", "cannot run", "does not fit", "too slow", "died", "failed", "left out")
Record = dict[str, Any]


class FormatError(Exception):
    """A file that is no benchmark's."""


def new_record(command: str, machine: dict[str, Any], threads: int, limits: dict[str, Any]) -> Record:
    return {
        "schema": SCHEMA,
        "made": now(),
        "command": command,
        "machine": {**machine, "threads": threads, "driver": driver() if machine["device"] == "cuda" else None},
        "versions": versions(),
        "limits": limits,
        "cases": [],
    }


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {type(error).__name__}"


def machine_line(record: Record) -> str:
    """The machine in a few words: "AMD EPYC, 2 threads"."""
    machine = record["machine"]
    if machine["device"] == "cuda":
        return str(machine["gpu"])
    return f"{machine['cpu']}, {machine['threads']} thread{'s' * (machine['threads'] > 1)}"


# what must be there, and its type
_RECORD = {"schema": int, "made": str, "command": str, "machine": dict, "versions": dict, "limits": dict, "cases": list}
_CASE = {
    "name": str, "group": str, "head": dict, "tokens": int, "dtype": str, "setting": str, "start": str,
    "learning_tokens": int, "learning_share": float, "input_bytes": int, "rows": list,
}  # fmt: skip
_ROW = {"method": str, "label": str, "floor": bool, "status": str, "why": str}
_MEASURED = {"seconds": dict, "rounds": dict, "repeats": bool, "shift": int}


def read(path: Path) -> Record:
    """A record whose every field that is used later is there; else a FormatError that says what is not."""
    try:
        record = json.loads(path.read_text())
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise FormatError(f"{path} is not JSON") from None
    check(record, path.name)
    return record


def check(record: Any, name: str) -> None:
    _fields(record, _RECORD, name)
    if record["schema"] != SCHEMA:
        raise FormatError(f"{name}: got schema {record['schema']}, expected {SCHEMA}")
    _fields(record["machine"], {"device": str, "cpu": str, "threads": int}, f"{name}: machine")
    for case in record["cases"]:
        _fields(case, _CASE, f"{name}: a case")
        for row in case["rows"]:
            where = f"{name}: a row of {case['name']!r}"
            _fields(row, _ROW, where)
            if row["status"] not in STATUSES:
                raise FormatError(f"{where}: got status {row['status']!r}, expected one of {', '.join(STATUSES)}")
            if row["status"] == "ok":
                _fields(row, _MEASURED, where)


def _fields(given: Any, expected: dict[str, type], where: str) -> None:
    if not isinstance(given, dict):
        raise FormatError(f"{where}: got {type(given).__name__}, expected an object")
    for key, kind in expected.items():
        if key not in given:
            raise FormatError(f"{where}: the key {key!r} is missing")
        if not isinstance(given[key], (int, float) if kind is float else kind):
            raise FormatError(f"{where}: {key!r} is {type(given[key]).__name__}, expected {kind.__name__}")
