"""Values as data: how the judging process and the program's process speak, with nothing in it that could be executed.

A frame is four bytes of length and JSON. A value in it is an atom (None, bool, str, float, a small int) or `[k]`, the
k-th entry of the frame's table of nodes, or, in a reply, `[-1 - k]`, the k-th node of the call it answers. So shared
and cyclic containers keep their shape, and a list handed over is the same list in the answer. What is no data, a
function or an object of a class, stays where it is: the other side gets a handle, which says what to ask here.

Only exact built-in types and a few of the standard library are rebuilt from data; a node that is anything else, or that
does not fit, is a `GarbledError`. Nothing on the wire can name code to run in the receiver.
"""

from __future__ import annotations

import builtins
import collections
import json
import os
import sys
from collections.abc import Callable
from typing import Any, cast

__builtins__ = dict(vars(builtins))  # type: ignore[assignment]  # a copy: what the program patches does not garble our frames
FRAME_BYTES = 16 << 20
_MOST_EXACT = 2**53
_CONTAINERS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
_MAPPINGS = {
    "dict": dict,
    "OrderedDict": collections.OrderedDict,
    "Counter": collections.Counter,
    "defaultdict": collections.defaultdict,
}
_CONSTANTS = {"Ellipsis": Ellipsis, "NotImplemented": NotImplemented}
_DATES = ("date", "datetime", "time")
EXCEPTIONS = {
    name: kind
    for name, kind in vars(builtins).items()
    if isinstance(kind, type) and issubclass(kind, BaseException) and kind.__name__ == name
}
PLAIN_TYPES: dict[str, type] = {
    kind.__name__: kind
    for kind in (bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset, range, object)
}
PLAIN_TYPES |= {"NoneType": type(None), **EXCEPTIONS}


class GarbledError(BaseException):
    """What came is not what this side could have been sent."""


class GoneError(BaseException):
    """The other side has ended, or closed its pipe."""


class UnpassableError(BaseException):
    """A value that cannot be passed as data, or whose meaning would change on the way. No test's `except Exception`
    may take it for an error of the program."""


_read, _write = os.read, os.write


class Channel:
    """Frames over a pair of pipes."""

    def __init__(self, source: int, target: int) -> None:
        self.source, self.target = source, target

    def send(self, message: list[Any]) -> None:
        data = json.dumps(message, separators=(",", ":")).encode()
        if len(data) > FRAME_BYTES:
            raise UnpassableError("it is too large")
        view = memoryview(len(data).to_bytes(4, "little") + data)
        try:
            while view:
                view = view[_write(self.target, view) :]
        except OSError:
            raise GoneError from None

    def receive(self) -> list[Any]:
        size = int.from_bytes(self._read(4), "little")
        if size > FRAME_BYTES:
            raise GarbledError("a frame's length")
        try:
            message = json.loads(self._read(size))
        except (ValueError, RecursionError):
            raise GarbledError("no JSON") from None
        if type(message) is not list or not message or type(message[0]) is not str:
            raise GarbledError("no message")
        return message

    def _read(self, count: int) -> bytes:
        parts = []
        while count:
            try:
                part = _read(self.source, min(count, 1 << 20))
            except OSError:
                raise GoneError from None
            if not part:
                raise GoneError
            count -= len(part)
            parts.append(part)
        return b"".join(parts)


class Packer:
    """Turns values into a table of nodes. handle: the node of what is no data, or an UnpassableError.

    known: objects of the frame that this one answers, which are referred to, not sent again.
    """

    def __init__(
        self, handle: Callable[[Any, Callable[[Any], Any]], list[Any]], known: list[Any] | None = None
    ) -> None:
        self.handle = handle
        self.objects: list[Any] = []  # one a node; kept, so that no address is used twice
        self.nodes: list[list[Any]] = []
        self._places = {id(value): -1 - place for place, value in enumerate(known or [])}

    def add(self, value: Any) -> Any:
        """The value as it stands in a frame; its nodes are in `nodes`."""
        packed = self.reference(value)
        while len(self.nodes) < len(self.objects):
            self.nodes.append(self.node(self.objects[len(self.nodes)]))
        return packed

    def reference(self, value: Any) -> Any:
        kind = type(value)
        if value is None or kind is bool or kind is str or kind is float:
            return value
        if kind is int and -_MOST_EXACT < value < _MOST_EXACT:
            return value
        place = self._places.get(id(value))
        if place is None:
            place = self._places[id(value)] = len(self.objects)
            self.objects.append(value)
        return [place]

    def node(self, value: Any) -> list[Any]:  # noqa: PLR0911  # one line a type
        kind = cast(Any, type(value))
        name = kind.__name__
        if _CONTAINERS.get(name) is kind:
            return [name, *map(self.reference, value)]
        if _MAPPINGS.get(name) is kind:
            first = [self.reference(value.default_factory)] if name == "defaultdict" else []
            return [name, *first, *(self.reference(part) for item in value.items() for part in item)]
        if kind is collections.deque:
            return ["deque", value.maxlen, *map(self.reference, value)]
        if kind is int:
            return ["int", hex(value)]
        if kind is bytes or kind is bytearray:
            return [name, value.hex()]
        if kind is complex:
            return ["complex", value.real, value.imag]
        if kind is range:
            return ["range", *map(self.reference, (value.start, value.stop, value.step))]
        if kind is type and value in PLAIN_TYPES.values():
            return ["type", value.__name__]
        if EXCEPTIONS.get(name) is kind:
            return self._exception(value)
        if any(value is constant for constant in _CONSTANTS.values()):
            return ["constant", repr(value)]
        return self._of_library(value) or self.handle(value, self.reference)

    def _exception(self, value: BaseException) -> list[Any]:
        """By its arguments, each of them data."""
        parts = [
            part if type(part) in (bool, int, float, str, bytes, tuple, list) else str(part) for part in value.args
        ]
        return ["exception", type(value).__name__, *map(self.reference, parts)]

    @staticmethod
    def _of_library(value: Any) -> list[Any] | None:
        kind = cast(Any, type(value))
        full = f"{kind.__module__}.{kind.__name__}"
        if vars(sys.modules.get(str(kind.__module__), builtins)).get(kind.__name__) is not kind:
            return None
        if full == "fractions.Fraction":
            return ["Fraction", hex(value.numerator), hex(value.denominator)]
        if full == "decimal.Decimal":
            return ["Decimal", str(value)]
        if full == "datetime.timedelta":
            return ["timedelta", value.days, value.seconds, value.microseconds]
        if full in ("datetime.date", "datetime.datetime", "datetime.time") and getattr(value, "tzinfo", None) is None:
            return [full.split(".")[1], value.isoformat()]
        return None


class Unpacker:
    """Rebuilds values from a table of nodes. handle: the value of a node that is a handle, or a GarbledError.

    known: the objects of the call that the frame answers.
    """

    def __init__(self, nodes: Any, handle: Callable[[list[Any], Callable[[Any], Any]], Any], known: list[Any]) -> None:
        if type(nodes) is not list or not all(type(n) is list and n and type(n[0]) is str for n in nodes):
            raise GarbledError("no table of nodes")
        self.nodes, self.handle, self.known = nodes, handle, known
        self.values: dict[int, Any] = {}
        self._building: set[int] = set()
        try:
            shells = [place for place, node in enumerate(nodes) if self._shell(place, node)]
            for place in shells:
                fill(self.values[place], nodes[place], self.value)
        except GarbledError:
            raise
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError, ArithmeticError) as error:
            raise GarbledError(f"{type(error).__name__}: {error}") from None
        except RecursionError:
            raise UnpassableError("it is nested too deeply") from None

    def value(self, packed: Any) -> Any:
        kind = type(packed)
        if packed is None or kind is bool or kind is str or kind is float or kind is int:
            return packed
        if kind is not list or len(packed) != 1 or type(packed[0]) is not int:
            raise GarbledError("no value")
        place = packed[0]
        if place < 0:
            if -1 - place >= len(self.known):
                raise GarbledError("no such object")
            return self.known[-1 - place]
        if place not in self.values:
            if place in self._building or place >= len(self.nodes):
                raise GarbledError("no such node")
            self._building.add(place)
            self.values[place] = self._build(self.nodes[place])
        return self.values[place]

    def _shell(self, place: int, node: list[Any]) -> bool:
        """Makes a container that can be filled later, for those that hold each other."""
        if node[0] == "list":
            self.values[place] = []
        elif node[0] == "set":
            self.values[place] = set()
        elif node[0] in _MAPPINGS:
            self.values[place] = _MAPPINGS[node[0]]()
        elif node[0] == "deque":
            self.values[place] = collections.deque(maxlen=node[1])
        elif node[0] == "bytearray":
            self.values[place] = bytearray()
        else:
            return False
        return True

    def _build(self, node: list[Any]) -> Any:  # noqa: PLR0911  # one line a type
        name, parts = node[0], node[1:]
        if name in ("tuple", "frozenset"):
            return _CONTAINERS[name](map(self.value, parts))
        if name == "int":
            return int(parts[0], 16)
        if name == "bytes":
            return bytes.fromhex(parts[0])
        if name == "complex":
            return complex(*map(float, parts))
        if name == "range":
            return range(*map(self.value, parts))
        if name == "type":
            return PLAIN_TYPES[parts[0]]
        if name == "exception":
            return _exception(parts[0], list(map(self.value, parts[1:])))
        if name == "constant":
            return _CONSTANTS[parts[0]]
        made = self._of_library(name, parts)
        return made if made is not None else self.handle(node, self.value)

    @staticmethod
    def _of_library(name: str, parts: list[Any]) -> Any:
        if name == "Fraction":
            return __import__("fractions").Fraction(int(parts[0], 16), int(parts[1], 16))
        if name == "Decimal":
            return __import__("decimal").Decimal(parts[0])
        if name == "timedelta":
            return __import__("datetime").timedelta(*parts)
        if name in _DATES:
            return getattr(__import__("datetime"), name).fromisoformat(parts[0])
        return None


def _exception(name: str, parts: list[Any]) -> BaseException:
    kind = EXCEPTIONS[name]
    try:
        return kind(*parts)
    except TypeError:
        error = kind.__new__(kind)
        error.args = tuple(parts)
        return error


def fill(container: Any, node: list[Any], value: Callable[[Any], Any]) -> None:
    """Makes a mutable container hold what the node says, and nothing else."""
    name, parts = node[0], node[1:]
    kind = _MAPPINGS.get(name) or {"list": list, "set": set, "deque": collections.deque, "bytearray": bytearray}.get(
        name
    )
    if kind is not type(container):
        raise GarbledError("another kind of container")
    if name == "list":
        container[:] = map(value, parts)
    elif name == "bytearray":
        container[:] = bytes.fromhex(parts[0])
    elif name == "deque":
        contents = list(map(value, parts[1:]))
        container.clear()
        container.extend(contents)
    elif name == "set":
        contents = list(map(value, parts))
        container.clear()
        container.update(contents)
    else:
        if name == "defaultdict":
            container.default_factory = value(parts.pop(0))
        keys, values = list(map(value, parts[::2])), list(map(value, parts[1::2]))
        container.clear()
        for key, content in zip(keys, values, strict=True):
            container[key] = content


def is_mutable(value: Any) -> bool:
    """Whether a call may change it where the caller sees it."""
    kind = type(value)
    return kind in (list, set, collections.deque, bytearray) or _MAPPINGS.get(kind.__name__) is kind
