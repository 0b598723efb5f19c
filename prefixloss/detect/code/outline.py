"""What a program is made of: its top-level statements, the names each binds and uses, and where it stops being Python.

Runs inside the sandbox, for parsing hostile text can take for ever or crash the interpreter. Its own text is sent
there, so it imports the standard library only.
"""

from __future__ import annotations

import ast
import codeop
import json
import symtable
from typing import Any

UNREADABLE = (SyntaxError, ValueError, OverflowError)
# state of a whole process, or what tells a process from another: a test that names one can only run in the program's
_SHARED = {
    "__dict__",
    "__main__",
    "asyncio",
    "builtins",
    "gc",
    "globals",
    "id",
    "inspect",
    "logging",
    "mock",
    "monkeypatch",
    "multiprocessing",
    "open",
    "os",
    "patch",
    "pathlib",
    "random",
    "shutil",
    "signal",
    "subprocess",
    "sys",
    "tempfile",
    "threading",
    "unittest",
    "vars",
    "warnings",
    "weakref",
}
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def outline(text: str, ends: list[int], tests: list[str]) -> str:
    """JSON of `error` (index of the first piece with which the text cannot be the beginning of a program, and why; or
    null), `statements` (of the text, as far as it can be read, with the `piece` each ends in) and `tests` (the
    statements of each; null for those that are not Python).

    ends: number of lines up to the end of each piece.
    """
    lines = text.split("\n")
    error = _first_error(lines, ends)
    readable = lines if error is None else _complete(lines, ends[error[0] - 1] if error[0] else 0)
    statements = _statements("\n".join(readable))
    for statement in statements:
        statement["piece"] = next(k for k, end in enumerate(ends) if statement["last"] <= end)
    return json.dumps({"error": error, "statements": statements, "tests": [_test(test) for test in tests]})


def _first_error(lines: list[str], ends: list[int]) -> tuple[int, str] | None:
    try:
        compile("\n".join(lines) + "\n", "<program>", "exec", dont_inherit=True)
        return None
    except UNREADABLE as error:
        last = error
    for piece, end in enumerate(ends):
        try:
            codeop.compile_command("\n".join(lines[:end]), "<program>", "exec")  # None: a beginning, so far
        except UNREADABLE as error:
            return _blamed(error, piece, ends)
    return _blamed(last, len(ends) - 1, ends)


def _blamed(error: Exception, piece: int, ends: list[int]) -> tuple[int, str]:
    """The piece with which reading failed, or the earlier one that the error points to, such as a bracket's opening."""
    line = getattr(error, "lineno", None) or ends[piece]
    pointed = next((k for k, end in enumerate(ends) if line <= end), piece)
    return min(piece, pointed), f"{type(error).__name__}: {getattr(error, 'msg', error)}"


def _complete(lines: list[str], end: int) -> list[str]:
    """The first `end` lines without a statement at their end that is unfinished, or that the next line goes on with."""
    following = next((line for line in lines[end:] if line.strip()), "")
    for count in range(end - following[:1].isspace(), 0, -1):
        if count == end or lines[count][:1].strip():
            try:
                compile("\n".join(lines[:count]) + "\n", "<program>", "exec", dont_inherit=True)
                return lines[:count]
            except UNREADABLE:
                continue
    return []


def _statements(text: str) -> list[dict[str, Any]]:
    """The top-level statements; those that share a line count as one.

    first, last: lines, from 1. text. binds, uses: global names. functions: first and last lines of those it defines, at
    any depth. defines: it only defines a function or class. stub: one without content. checks: it is an assertion.
    imports: it is an import. modules: those it imports, at any depth. raising: the lines of its `raise`
    statements. shared: as a
    test, it needs the process that the program runs in.
    """
    groups: list[list[ast.stmt]] = []
    for node in ast.parse(text).body:
        if groups and _first_line(node) <= (groups[-1][-1].end_lineno or 0):
            groups[-1].append(node)
        else:
            groups.append([node])
    return [_statement(nodes, text.split("\n")) for nodes in groups]


def _first_line(node: ast.stmt) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])


def _statement(nodes: list[ast.stmt], lines: list[str]) -> dict[str, Any]:
    first, last = _first_line(nodes[0]), nodes[-1].end_lineno or nodes[-1].lineno
    text = "\n".join(lines[first - 1 : last])
    binds: set[str] = set()
    uses: set[str] = set()
    _collect(symtable.symtable(text, "<program>", "exec"), binds, uses)
    parts = [part for node in nodes for part in ast.walk(node)]
    defines = all(isinstance(node, _DEFINITIONS) for node in nodes)
    if not defines:
        binds.update(_changed(nodes))
    return {
        "first": first,
        "last": last,
        "text": text,
        "binds": sorted(binds),
        "uses": sorted(uses),
        "functions": [
            (_first_line(part), part.end_lineno)
            for part in parts
            if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef))
        ],
        "defines": defines,
        "stub": all(_is_stub(node) for node in nodes),
        "checks": all(isinstance(node, ast.Assert) for node in nodes),
        "imports": all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in nodes),
        "modules": sorted({name for part in parts for name in _modules(part)}),
        "raising": [
            line
            for part in parts
            if isinstance(part, ast.Raise)
            for line in range(part.lineno, (part.end_lineno or part.lineno) + 1)
        ],
        "shared": any(_is_shared(part) for part in parts),
    }


def _modules(node: ast.AST) -> list[str]:
    """The modules that a node imports, without what follows the first point."""
    names: list[str | None] = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and not node.level:
        names = [node.module]
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = getattr(node.func, "attr", getattr(node.func, "id", ""))
        names = [str(node.args[0].value)] if called in ("__import__", "import_module") else []
    return [name.split(".")[0] for name in names if name]


def _is_shared(node: ast.AST) -> bool:
    """Whether a test with this node would not be the same from outside the program's process."""
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        is_identity = any(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops)
        return is_identity and not any(isinstance(side, ast.Constant) for side in sides)
    if isinstance(node, (ast.ClassDef, ast.AsyncFunctionDef, ast.Await)):
        return True
    names = {getattr(node, "id", None), getattr(node, "attr", None), *_modules(node)}
    if isinstance(node, ast.ImportFrom):
        names.update(alias.name for alias in node.names)
    return not _SHARED.isdisjoint(names)


def _changed(nodes: list[ast.stmt]) -> set[str]:
    """Names of which an attribute or an item is set."""
    names = set()
    for part in (part for node in nodes for part in ast.walk(node)):
        if isinstance(part, (ast.Attribute, ast.Subscript)) and isinstance(part.ctx, (ast.Store, ast.Del)):
            base: ast.expr = part
            while isinstance(base, (ast.Attribute, ast.Subscript)):
                base = base.value
            if isinstance(base, ast.Name):
                names.add(base.id)
    return names


def _collect(table: symtable.SymbolTable, binds: set[str], uses: set[str]) -> None:
    module = table.get_type() == "module"
    for symbol in table.get_symbols():
        if module or symbol.is_global():
            if symbol.is_assigned() or symbol.is_imported():
                binds.add(symbol.get_name())
            if symbol.is_referenced():
                uses.add(symbol.get_name())
    for child in table.get_children():
        _collect(child, binds, uses)


def _is_stub(node: ast.stmt) -> bool:
    def is_empty(part: ast.stmt) -> bool:
        if isinstance(part, ast.Raise) and part.exc is not None:
            name = part.exc.func if isinstance(part.exc, ast.Call) else part.exc
            return isinstance(name, ast.Name) and name.id == "NotImplementedError"
        return isinstance(part, ast.Pass) or (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))

    return isinstance(node, _DEFINITIONS) and all(is_empty(part) or _is_stub(part) for part in node.body)


def _test(text: str) -> list[dict[str, Any]] | None:
    try:
        return _statements(text)
    except UNREADABLE:
        return None
