"""Whether a trainer's package is there and new enough, said before its own imports can fail in their own words."""

from __future__ import annotations

import importlib
import inspect
import re
from importlib import metadata
from typing import Any


def version(package: str) -> str:
    """The installed version; ImportError where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError as missing:
        raise ImportError(f"{package}: got none installed, expected it: pip install {package}") from missing


def check_version(package: str, first: str) -> None:
    """ImportError unless `package` is installed in version `first` (such as "1.9") or a newer one."""
    if older(package, first):
        raise ImportError(f"{package}: got version {version(package)}, expected {first} or newer")


def older(package: str, than: str) -> bool:
    """Of the first two numbers alone."""
    return _numbers(version(package)) < _numbers(than)


def module(name: str, *beside: str) -> Any:
    """The module; ImportError says with which versions, of its package and those `beside`, it could not be imported."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a lazy package turns an ImportError into a RuntimeError
        found = ", ".join(f"{package} {version(package)}" for package in (name.partition(".")[0], *beside))
        raise ImportError(f"{name}: got {found}, which do not import together ({error})") from error


def check_takes(name: str, function: Any, parameters: list[str]) -> None:
    """ImportError unless `function`, called `name`, which ours is to replace, begins with these parameters."""
    found = list(inspect.signature(function).parameters)
    if found[: len(parameters)] != parameters:
        got = f"{name}({', '.join(found)}) in {version(name.partition('.')[0])}"
        raise ImportError(f"{name}: got {got}, expected ({', '.join(parameters)})")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(x) for x in re.findall(r"\d+", version)[:2])
