"""The judging process: executes the tests, asks the program's process for what they name, and reports how each ended.

A test's expressions are evaluated here, with this process's built-ins and libraries. A name that the test does not set
is asked for in the program's process: data comes by value, functions and objects as stand-ins that pass what is done to
them on, with the arguments as data. So the program never sees a test nor an expected value, and all it can send back
is data, the exception it raised, or a handle. The boundary:

- arguments and results are copies; what a call changes in its arguments is changed here too;
- a class of the program is a stand-in class here (`isinstance`, `except`, `type(x) is A` work), an object one handle
  however often it comes, so that `is` holds among objects;
- a comparison or an operator that an object of the program answers itself (`__eq__`, `__contains__`, `__sub__`) is
  *hearsay*, for it is told the other side, which may be what is expected: the test is marked;
- what is no data and no function (an iterator or an object of the test's as an argument, an object that is a kind of
  list), and a test that changes a value it looked up in the program, is *unpassable*: such a test can only be run in
  the program's process, where its result is hearsay too.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import sys
import types
from typing import TYPE_CHECKING, Any, NamedTuple, cast

if TYPE_CHECKING or __package__:
    from prefixloss.detect.code import sandbox_program as own
    from prefixloss.detect.code import sandbox_wire as wire
else:
    import sandbox_program as own  # this file is no part of a package in there
    import sandbox_wire as wire

_BUILTINS = frozenset(dir(builtins))
_COMPARED = {"eq", "ne", "lt", "le", "gt", "ge", "contains"}
_COMPUTED = {"add", "sub", "mul", "truediv", "floordiv", "mod", "divmod", "pow", "matmul", "and", "or", "xor", "lshift"}
_COMPUTED |= {"rshift"}
_TOLD = _COMPARED | _COMPUTED | {f"{side}{op}" for op in _COMPUTED for side in "ri"}  # they get what may be expected
_OUTPUT_CHARS = 1 << 20
_PASSED_ON = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)


class Check(NamedTuple):
    """inside: to be run in the program's process. names: those that mean the program's, though a built-in has them."""

    file: str
    source: str
    inside: bool
    names: list[str]


class OverError(BaseException):
    """The program's time is up."""


class _StandInClass(type):
    """The type of stand-ins for the program's classes."""

    judge_: Judge
    number_: int

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> Any:
        if any(isinstance(base, _StandInClass) and hasattr(base, "number_") for base in bases):
            raise base_judge(bases).unpassable("a class of the test's that is a kind of the program's")
        return super().__new__(mcs, name, bases, namespace)

    def __call__(cls, *arguments: Any, **keywords: Any) -> Any:
        return cls.judge_.ask(cls, "call", arguments, keywords)

    def __getattr__(cls, name: str) -> Any:
        if name in ("judge_", "number_"):
            raise AttributeError(name)
        return cls.judge_.watched(cls.judge_.ask(cls, "getattr", (name,)))

    def __setattr__(cls, name: str, value: Any) -> None:
        cls.judge_.ask(cls, "setattr", (name, value))

    def __iter__(cls) -> Any:
        return cls.judge_.ask(cls, "iter", ())

    def __len__(cls) -> Any:
        return cls.judge_.ask(cls, "len", ())

    def __getitem__(cls, key: Any) -> Any:
        return cls.judge_.ask(cls, "getitem", (key,))

    def __contains__(cls, key: Any) -> Any:
        return cls.judge_.ask(cls, "contains", (key,))

    def __bool__(cls) -> bool:
        return True


class StandIn(metaclass=_StandInClass):
    """An object of the program's. Its subclasses stand for the program's classes and have their special methods."""

    judge_: Judge
    number_: int

    def __getattr__(self, name: str) -> Any:
        return self.judge_.watched(self.judge_.ask(self, "getattr", (name,)))

    def __setattr__(self, name: str, value: Any) -> None:
        self.judge_.ask(self, "setattr", (name, value))

    def __delattr__(self, name: str) -> None:
        self.judge_.ask(self, "delattr", (name,))


def base_judge(bases: tuple[type, ...]) -> Judge:
    return next(base.judge_ for base in bases if isinstance(base, _StandInClass))


def _passed_on(name: str) -> Any:
    """The special method of a stand-in."""

    def special(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if name == "exit":
            arguments = (None, None, None) if arguments[0] is None else (*arguments[:2], None)
        return self.judge_.ask(self, name, arguments, keywords)

    return special


def _set(target: Any, **attributes: Any) -> None:
    """Attributes of the stand-in itself."""
    for name, value in attributes.items():
        (type if isinstance(target, type) else object).__setattr__(target, name, value)


class _Names(dict):
    """The tests' global names; what is not there is asked for."""

    judge: Judge

    def __missing__(self, name: str) -> Any:
        return self.judge.name(name)


class Judge:
    """Runs tests. program: the channel to it; None where there is none."""

    def __init__(self, program: wire.Channel | None) -> None:
        self.program = program
        self.names = _Names(__name__="__main__")
        self.names.judge = self
        self.own_names: frozenset[str] = frozenset()
        self.functions: list[Any] = []  # of the tests', which the program has handles of
        self.objects: dict[int, Any] = {}
        self.output = own.StringBuffer()
        self.hearsay = False
        self.problem: BaseException | None = None  # what no test may catch
        self.places: dict[int, tuple[BaseException, list[Any], list[Any]]] = {}  # of the program's exceptions
        self.looked_up: list[tuple[Any, str]] = []

    # ---- the program's cells, the tests --------------------------------------------------------------------

    def cell(self, index: int) -> list[Any]:
        """How a cell of the program ended: ending, exception, message, places, claims, hearsay."""
        return self.inside(["cell", index])

    def inside(self, request: list[Any]) -> list[Any]:
        try:
            reply = self.exchange(request)
        except (wire.GoneError, wire.GarbledError) as error:
            return self.ending_of(error)
        if reply[0] == "done":
            return ["passed", "", "", [], [], request[0] == "test"]
        if reply[0] == "over":
            return ["over", "", "", _read_places(reply[1]), [], False]
        if reply[0] == "unpassable":
            return ["unpassable", "", str(reply[1]), [], [], False]
        _, _, name, message, places, claims = reply[1:]
        return ["raised", str(name), str(message), _read_places(places), claims, False]

    def test(self, test: Check, code: Any) -> list[Any]:
        self.hearsay, self.problem, self.own_names = False, None, frozenset(test.names)
        self.looked_up = []
        if test.inside:
            return self.inside(["test", test.file, test.source])
        error = None
        try:
            if isinstance(code, BaseException):
                raise code
            exec(code, self.names)
            self.refuse_changes()
        except BaseException as caught:
            error = caught
        if self.problem is not None:
            error = self.problem
        if error is not None:
            return self.ending_of(error, test.file)
        return ["passed", "", "", [], [], self.hearsay]

    def ending_of(self, error: BaseException, file: str = "") -> list[Any]:
        if isinstance(error, (OverError, own.OutOfTime)):
            return ["over", "", "", [*own.places(error, (file,)), *self.places_of(error)[0]], [], False]
        for kind, ending in (
            (wire.GoneError, "gone"),
            (wire.GarbledError, "garbled"),
            (wire.UnpassableError, "unpassable"),
        ):
            if isinstance(error, kind):
                return [ending, "", own.message(error), [], [], False]
        places, claims = self.places_of(error)
        name = type.__getattribute__(type(error), "__name__")
        where = [*own.places(error, (file,)), *places]
        return ["raised", name[:80], own.message(error), where, claims or own.claims(error), False]

    def places_of(self, error: BaseException) -> tuple[list[Any], list[Any]]:
        """Where in the program an exception of its own came from, and what it claims to lack."""
        known = self.places.get(id(error))
        return known[1:] if known is not None and known[0] is error else ([], [])

    def unpassable(self, what: str) -> wire.UnpassableError:
        self.problem = wire.UnpassableError(what)
        return self.problem

    def watched(self, value: Any) -> Any:
        """Remembers a value that was looked up: a change to it would be a change to a copy."""
        if wire.is_mutable(value):
            self.looked_up.append((value, self.picture(value)))
        return value

    def picture(self, value: Any) -> str:
        packer = wire.Packer(self.handle)
        packer.add(value)
        return repr(packer.nodes)

    def refuse_changes(self) -> None:
        if any(self.picture(value) != was for value, was in self.looked_up):
            raise self.unpassable("a change to a value that the program holds")

    # ---- asking the program --------------------------------------------------------------------------------

    def name(self, name: str) -> Any:
        if self.program is None or (name in _BUILTINS and name not in self.own_names) or name == "__builtins__":
            raise KeyError(name)
        reply = self.exchange(["name", name])
        if reply[0] == "missing":
            raise KeyError(name)
        if reply[0] == "library":
            module, own_name = reply[1:]
            if module not in own.MODULES or type(own_name) is not str:
                raise self.noted(wire.GarbledError("no library"))
            library = importlib.import_module(module)
            return getattr(library, own_name) if own_name else library
        value = self.result(reply, [], "getattr")
        return self.watched(value)

    def ask(self, target: Any, op: str, arguments: tuple[Any, ...], keywords: dict[str, Any] | None = None) -> Any:
        """What the program's object gives for the operation."""
        packer = wire.Packer(self.handle)
        packed = packer.add((target, arguments, keywords or {}))
        self.hearsay |= op in _TOLD
        collect = sys.stdout is not self.output
        reply = self.exchange(["op", packer.nodes, packed, op, collect])
        return self.result(reply, packer.objects, op)

    def exchange(self, request: list[Any]) -> list[Any]:
        """The program's reply; meanwhile it may call functions of the test that it was given."""
        if self.program is None:
            raise wire.GoneError
        if self.problem is not None:
            raise self.problem
        try:
            self.program.send(request)
            while True:
                reply = self.program.receive()
                if reply[0] != "back":
                    return _checked(reply, request[0])
                self.program.send(self.called_back(reply))
        except (wire.GoneError, wire.GarbledError, wire.UnpassableError) as error:
            raise self.noted(error) from None

    def called_back(self, reply: list[Any]) -> list[Any]:
        try:
            function = self.functions[reply[1]]
            arguments, keywords = wire.Unpacker(reply[2], self.stand_in, []).value(reply[3])
        except (TypeError, ValueError, IndexError):
            raise wire.GarbledError("no call") from None
        packer = wire.Packer(self.handle)
        try:
            return ["done", *_packed(packer, function(*arguments, **keywords))]
        except Exception as error:
            packer = wire.Packer(self.handle)
            return ["raised", *_packed(packer, error)]

    def noted(self, error: Any) -> Any:
        self.problem = error
        return error

    def result(self, reply: list[Any], known: list[Any], op: str) -> Any:
        if reply[0] == "over":
            error = OverError()
            self.places[id(error)] = (error, _read_places(reply[1]), [])
            raise self.noted(error)
        if reply[0] == "unpassable":
            raise self.unpassable(str(reply[1]))
        try:
            unpacker = wire.Unpacker(reply[1], self.stand_in, known)
            value = unpacker.value(reply[2])
            if reply[0] == "done":
                for place, node in reply[3]:
                    wire.fill(known[place], node, unpacker.value)
                if reply[4] and sys.stdout is not self.output:
                    sys.stdout.write(reply[4])
                return value
        except (TypeError, ValueError, IndexError):
            raise self.noted(wire.GarbledError("no result")) from None
        except (wire.GarbledError, wire.UnpassableError) as error:
            raise self.noted(error) from None
        if not isinstance(value, BaseException):
            raise self.noted(wire.GarbledError("no exception"))
        if isinstance(value, StopIteration) and op != "next":
            value = RuntimeError("StopIteration")  # or it would end a loop of the test's as if all were well
        value.__traceback__ = None
        self.places[id(value)] = (value, _read_places(reply[5]), reply[6])
        raise value

    # ---- handles -------------------------------------------------------------------------------------------

    def handle(self, value: Any, _: Any) -> list[Any]:
        if isinstance(value, (StandIn, _StandInClass)):
            return ["yours", object.__getattribute__(value, "__dict__")["number_"]]
        if type(value) in _PASSED_ON:
            self.functions.append(value)
            return ["function", len(self.functions) - 1]
        raise self.unpassable(f"an object of type {type(value).__name__}")

    def stand_in(self, node: list[Any], value: Any) -> Any:
        """For a handle, the same one each time."""
        if node[0] == "yours":
            return self.functions[node[1]]
        number = node[1]
        if type(number) is not int or node[0] not in ("object", "class"):
            raise wire.GarbledError("no such node")
        if number not in self.objects:
            self.objects[number] = self._class(node, value) if node[0] == "class" else self._object(node, value)
        return self.objects[number]

    def _class(self, node: list[Any], value: Any) -> Any:
        _, number, name, bases, special = node
        if not set(special) <= set(own.SPECIALS):
            raise wire.GarbledError("no special method")
        kinds = [kind for kind in map(value, bases) if kind is not object]
        if not all(isinstance(kind, _StandInClass) or kind in wire.EXCEPTIONS.values() for kind in kinds):
            raise wire.GarbledError("no class")
        if not any(isinstance(kind, _StandInClass) for kind in kinds):
            kinds.insert(0, StandIn)
        namespace = {f"__{one}__": _passed_on(one) for one in special}
        kind = type.__new__(_StandInClass, name, tuple(kinds), namespace)
        _set(kind, judge_=self, number_=number)
        return kind

    def _object(self, node: list[Any], value: Any) -> Any:
        kind = _Function if node[2] is None else value(node[2])
        if not isinstance(kind, _StandInClass):
            raise wire.GarbledError("no class")
        made = cast(Any, kind.__new__)(kind)
        _set(made, judge_=self, number_=node[1])
        if isinstance(made, BaseException):
            vars(BaseException)["args"].__set__(made, tuple(map(value, node[3:])))
        return made


class _Function(StandIn):
    """A function of the program's, or a module."""

    __call__ = _passed_on("call")


def _packed(packer: wire.Packer, value: Any) -> list[Any]:
    packed = packer.add(value)
    return [packer.nodes, packed]


def _read_places(places: Any) -> list[Any]:
    if type(places) is not list or len(places) > own.TRACE_LINES:
        return []
    return [place for place in places if type(place) is list and [type(part) for part in place] == [str, int]]


_LENGTHS = {"done": 5, "raised": 7, "over": 2, "unpassable": 2, "missing": 1, "library": 3}


def _checked(reply: list[Any], asked: str) -> list[Any]:
    """A reply of a known kind; a cell has no other ends than those of code."""
    if len(reply) != _LENGTHS.get(reply[0], 0) or (asked != "name" and reply[0] in ("missing", "library")):
        raise wire.GarbledError("no reply")
    return reply


def run(cells: int, tests: list[Check], program: wire.Channel | None, verdicts: wire.Channel) -> bool:
    """Reports the end of each cell and test: "passed", "raised", "over" (out of time), "gone" (the process has ended),
    "garbled", "unpassable". After the first of the middle three nothing more is run. False where the program is gone.
    """
    if program is not None and program.receive() != ["locked in"]:
        return False
    verdicts.send(["locked in"])
    judge = Judge(program)
    sys.stdout = judge.output
    codes = own.compiled([(test.file, test.source) for test in tests])
    ending = ""
    for index in range(cells + len(tests)):
        end = judge.cell(index) if index < cells else judge.test(tests[index - cells], codes[index - cells])
        verdicts.send(["result", index, *end])
        ending = end[0]
        if ending in ("over", "gone", "garbled"):
            break
        judge.problem = None
    verdicts.send(["end", judge.output.getvalue()[:_OUTPUT_CHARS]])
    return ending != "gone"
