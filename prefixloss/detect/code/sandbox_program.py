"""The program's process: executes the program's cells and answers the judging process, with data, what it is asked.

Nothing here is trusted. The program can walk these frames, patch every name and write what it likes to the pipe: all
it can reach is its own answers. It holds neither a test nor an expected value, but for the cells that the judge says
cannot be judged from outside and therefore have to run here.
"""

from __future__ import annotations
import __future__

import _signal as signal  # type: ignore[import-not-found]
import builtins
import sys
import types
from contextlib import suppress
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING or __package__:
    from prefixloss.detect.code import sandbox_wire as wire
else:
    import sandbox_wire as wire  # this file is no part of a package in there

__builtins__ = dict(vars(builtins))  # type: ignore[assignment]  # a copy: what the program patches does not garble our frames
MESSAGE_CHARS = 200
TRACE_LINES = 30
MODULES = (  # whose functions and modules a test may take by the program's name for them: the judge uses its own
    "bisect",
    "cmath",
    "collections",
    "copy",
    "dataclasses",
    "datetime",
    "decimal",
    "enum",
    "fractions",
    "functools",
    "heapq",
    "itertools",
    "json",
    "math",
    "operator",
    "re",
    "statistics",
    "string",
    "typing",
)
SPECIALS = (  # special methods that a stand-in passes on
    "call",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "hash",
    "bool",
    "len",
    "iter",
    "next",
    "reversed",
    "contains",
    "getitem",
    "setitem",
    "delitem",
    "repr",
    "str",
    "format",
    "bytes",
    "int",
    "float",
    "complex",
    "index",
    "neg",
    "pos",
    "abs",
    "invert",
    "round",
    "trunc",
    "floor",
    "ceil",
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "divmod",
    "pow",
    "matmul",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
    "radd",
    "rsub",
    "rmul",
    "rtruediv",
    "rfloordiv",
    "rmod",
    "rdivmod",
    "rpow",
    "rmatmul",
    "rand",
    "ror",
    "rxor",
    "rlshift",
    "rrshift",
    "iadd",
    "isub",
    "imul",
    "itruediv",
    "ifloordiv",
    "imod",
    "ipow",
    "imatmul",
    "iand",
    "ior",
    "ixor",
    "ilshift",
    "irshift",
    "enter",
    "exit",
)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.MethodWrapperType)


_settrace, _setprofile = sys.settrace, sys.setprofile


class OutOfTime(BaseException):
    """The program's time is up."""


class StringBuffer:
    """What a program prints while the test collects it."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def write(self, text: str) -> int:
        self.parts.append(text)
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""

    def getvalue(self) -> str:
        return "".join(self.parts)


def compiled(cells: list[tuple[str, str]], flags: int = 0) -> list[CodeType | BaseException]:
    """Code or the error of every cell; a `from __future__ import annotations` counts for those after it."""
    out: list[CodeType | BaseException] = []
    for name, source in cells:
        try:
            code = compile(source, name, "exec", flags, dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            out.append(error)
        else:
            flags |= code.co_flags & __future__.annotations.compiler_flag
            out.append(code)
    return out


def places(error: BaseException, files: tuple[str, ...]) -> list[list[Any]]:
    """File and line of the frames in these files, outermost first, each once: a deep recursion is no long list."""
    seen: dict[tuple[str, int], None] = {}
    trace = error.__traceback__
    while trace is not None and len(seen) < TRACE_LINES:
        if trace.tb_frame.f_code.co_filename in files:
            seen[trace.tb_frame.f_code.co_filename, trace.tb_lineno or 0] = None
        trace = trace.tb_next
    return [list(place) for place in seen]


def message(error: BaseException) -> str:
    try:
        return str(error)[:MESSAGE_CHARS]
    except BaseException:
        return ""


def claims(error: BaseException) -> list[list[Any]]:
    """What an exception and those it came from say that they lack: kind, detail, and the innermost frame's file."""
    out: list[list[Any]] = []
    current: BaseException | None = error
    while current is not None and len(out) < 5:
        trace, file = current.__traceback__, ""
        while trace is not None:
            file = trace.tb_frame.f_code.co_filename
            trace = trace.tb_next
        if isinstance(current, ModuleNotFoundError):
            out.append(["module", str(current.name or ""), file])
        elif isinstance(current, OSError):
            name = current.filename if type(current.filename) is str else ""
            out.append(["os", f"{current.errno or 0}:{name}", file])
        elif isinstance(current, MemoryError):
            out.append(["memory", "", file])
        elif isinstance(current, EOFError):
            out.append(["input", message(current), file])
        elif isinstance(current, RuntimeError) and "start new thread" in message(current):
            out.append(["thread", "", file])
        current = current.__cause__ or current.__context__
    return out


class Program:
    """Answers the judge. channel: to it. limits are kept by the process's own timers and by the guest."""

    def __init__(self, cells: list[tuple[str, str]], channel: wire.Channel) -> None:
        self.channel = channel
        self.files = tuple(name for name, _ in cells)
        self.code = compiled(cells)
        self.flags = 0
        for code in self.code:
            if isinstance(code, CodeType):
                self.flags |= code.co_flags & __future__.annotations.compiler_flag
        self.module = ModuleType("__main__")
        self.module.__dict__["__builtins__"] = builtins
        self.objects: list[Any] = []  # what the judge has handles of
        self.numbers: dict[int, int] = {}

    def serve(self) -> list[Any]:
        """Answers until the judge answers: the reply to what the program asked it, or the end of its pipe."""
        while True:
            request = self.channel.receive()
            if request[0] in ("done", "raised"):
                return request
            self.channel.send(self.answer(request))

    def answer(self, request: list[Any]) -> list[Any]:
        """["done", table, value, changes, output], ["raised", ...] or ["over", ...]: time is up."""
        try:
            reply = getattr(self, f"do_{request[0]}")(*request[1:])
        except OutOfTime as error:
            for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
                signal.setitimer(timer, 0)
            reply = ["over", places(error, self.files)]
        except wire.UnpassableError as error:
            reply = ["unpassable", str(error)]
        except (wire.GarbledError, wire.GoneError):
            raise
        except BaseException as error:
            reply = self.raised(error)
        with suppress(BaseException):  # it is the program's own stdout
            sys.stdout.flush()
        return reply

    def raised(self, error: BaseException) -> list[Any]:
        packer = wire.Packer(self.handle)
        try:
            packed = packer.add(error)
        except BaseException:  # its arguments cannot be passed, or do not even pretend to be an exception's
            packer = wire.Packer(self.handle)
            packed = packer.add(RuntimeError(message(error)))
        name = type.__getattribute__(type(error), "__name__")
        return ["raised", packer.nodes, packed, name[:80], message(error), places(error, self.files), claims(error)]

    # ---- what the judge asks -------------------------------------------------------------------------------

    def do_cell(self, index: int) -> list[Any]:
        return self.executed(self.code[index])

    def do_test(self, name: str, source: str) -> list[Any]:
        """A test that has to run in here."""
        self.files = (*self.files, name)
        return self.executed(compiled([(name, source)], self.flags)[0])

    def executed(self, code: CodeType | BaseException) -> list[Any]:
        _settrace(None)
        _setprofile(None)
        if isinstance(code, BaseException):
            raise code
        exec(code, self.module.__dict__)
        return ["done", [], None, [], ""]

    def do_name(self, name: str) -> list[Any]:
        """A global name: a few libraries by their names, else a value."""
        try:
            value = self.module.__dict__[name]
        except KeyError:
            return ["missing"]
        if isinstance(value, ModuleType) and value.__name__ in MODULES:
            return ["library", value.__name__, ""]
        home, own = getattr(value, "__module__", None), getattr(value, "__name__", None)
        if home in MODULES and type(own) is str and getattr(sys.modules.get(home), own, None) is value:
            return ["library", home, own]
        return self.reply(value, [], [])

    def do_op(self, nodes: list[Any], packed: Any, op: str, collect: bool) -> list[Any]:
        """Something done to an object with arguments: (object, arguments, keywords)."""
        unpacker = wire.Unpacker(nodes, self.unpacked_handle, [])
        target, arguments, keywords = unpacker.value(packed)
        known = [unpacker.values.get(place) for place in range(len(nodes))]
        buffer, before = StringBuffer(), sys.stdout
        if collect:
            sys.stdout = buffer
        try:
            if op == "call":
                value = target(*arguments, **keywords)
            elif op in ("getattr", "setattr", "delattr"):
                value = cast(Any, {"getattr": getattr, "setattr": setattr, "delattr": delattr})[op](target, *arguments)
            else:
                value = getattr(type(target), f"__{op}__")(target, *arguments, **keywords)
        finally:
            if collect:
                sys.stdout = before
        return self.reply(value, known, nodes, buffer.getvalue())

    def reply(self, value: Any, known: list[Any], nodes: list[Any], output: str = "") -> list[Any]:
        packer = wire.Packer(self.handle, known)
        packed = packer.add(value)
        changes = []
        for place, container in enumerate(known):
            if container is not None and wire.is_mutable(container):
                was = [[-1 - part[0]] if type(part) is list else part for part in nodes[place]]
                now = packer.node(container)
                if now != was:
                    changes.append([place, now])
        packer.add(None)  # what the changes refer to
        return ["done", packer.nodes, packed, changes, output]

    # ---- handles -------------------------------------------------------------------------------------------

    def number(self, value: Any) -> int:
        """Of an object that the judge gets a handle of; kept, so that its address stays its own."""
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.objects)
            self.objects.append(value)
        return self.numbers[id(value)]

    def handle(self, value: Any, reference: Any) -> list[Any]:
        if isinstance(value, Callback):
            return ["yours", value.number_]
        if isinstance(value, type):
            return self.class_node(value, reference)
        if isinstance(value, ModuleType) or type(value) in _FUNCTIONS:
            return ["object", self.number(value), None]
        kind: type = type(value)
        parts = value.args if isinstance(value, BaseException) else ()
        return ["object", self.number(value), reference(kind), *map(reference, parts)]

    def class_node(self, kind: type, reference: Any) -> list[Any]:
        """A class by its name, bases and special methods. One with data of its own, as a list's, is no handle."""
        bases = []
        for base in kind.__bases__:
            if base in wire.PLAIN_TYPES.values() and base is not object and not issubclass(base, BaseException):
                raise wire.UnpassableError(f"a kind of {base.__name__}")
            bases.append(reference(base))
        special = [
            name
            for name in SPECIALS
            if (found := getattr(kind, f"__{name}__", None)) is not None
            and found is not getattr(object, f"__{name}__", None)
            and found is not getattr(BaseException, f"__{name}__", None)
            and (name != "call" or any("__call__" in vars(base) for base in kind.__mro__))
        ]
        return ["class", self.number(kind), kind.__name__, bases, special]

    def unpacked_handle(self, node: list[Any], value: Any) -> Any:
        if node[0] == "yours":
            return self.objects[node[1]]
        if node[0] == "function":
            return Callback(self, node[1])
        raise wire.GarbledError("no such node")


class Callback:
    """A function of a test, which the program may call and nothing else."""

    def __init__(self, program: Program, number: int) -> None:
        self.program_, self.number_ = program, number

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        program = self.program_
        packer = wire.Packer(program.handle)
        packed = packer.add((arguments, keywords))
        program.channel.send(["back", self.number_, packer.nodes, packed])
        reply = program.serve()
        unpacker = wire.Unpacker(reply[1], program.unpacked_handle, packer.objects)
        value = unpacker.value(reply[2])
        if reply[0] == "raised":
            raise value
        return value


def run(cells: list[tuple[str, str]], source: int, target: int) -> None:
    """Serves the judge until it closes its pipe. The first message says that this process is locked in."""
    program = Program(cells, wire.Channel(source, target))
    program.channel.send(["locked in"])
    for name in ("sandbox_wire", "sandbox_program", "sandbox_judge"):
        sys.modules.pop(name, None)
    sys.modules["__main__"] = program.module
    if any("random" in text for _, text in cells):  # the same program shall give the same result
        __import__("random").seed(0)
    try:
        program.serve()
    except (wire.GoneError, wire.GarbledError):
        return
