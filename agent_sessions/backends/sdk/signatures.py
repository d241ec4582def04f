"""What a class takes, read from its source: importing the SDK takes seconds.

So a misspelt option is told by `manage.py check`, which must not import it.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# How often an import is followed to where a class is defined.
_DEPTH = 8


@dataclass(frozen=True, slots=True)
class Signature:
    """The arguments of a class or of a function, without the session's id.

    `is_open` says that it takes others too, of which the source tells nothing.
    """

    names: frozenset[str]
    required: frozenset[str] = frozenset()
    is_open: bool = False

    def with_more(self, other: Signature | None) -> Signature:
        """Return the same with the arguments that it passes on."""
        if other is None:
            return Signature(self.names, self.required, is_open=True)
        return Signature(self.names | other.names, self.required, other.is_open)


class NotFound(LookupError):
    """There is no such module, or no such class in it."""


def read_signature(target: str | Callable[..., Any]) -> Signature | None:
    """Read what a class, or a class method of it, takes; None where that can't be told.

    Raises NotFound where its module is not installed, or has nothing of that name.
    """
    if not isinstance(target, str):
        return _of_object(target)
    module, names = _locate(target)
    if not 1 <= len(names) <= 2:
        raise NotFound(target)
    found = _find_class(module, names[0], _DEPTH)
    if found is None:
        if not _binds(module, names[0]):
            raise NotFound(target)
        return None
    return _of_method(*found, names[1] if len(names) == 2 else "__init__")


def _of_object(target: Callable[..., Any]) -> Signature | None:
    try:
        parameters = list(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):
        return None
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    named = [
        p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    skipped = _session_parameter([p.name for p in positional], [p.name for p in named])
    named = [p for p in named if p.name != skipped]
    return Signature(
        frozenset(p.name for p in named),
        frozenset(p.name for p in named if p.default is p.empty),
        any(p.kind is p.VAR_KEYWORD for p in parameters),
    )


def _session_parameter(positional: list[str], named: list[str]) -> str | None:
    """Name the argument that takes the session's id: `session_id`, else the first."""
    if "session_id" in named:
        return "session_id"
    return positional[0] if positional else None


# -- sources ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Module:
    name: str
    file: Path
    is_package: bool

    def absolute(self, name: str | None, level: int) -> str:
        """Return the dotted name of what the module imports from."""
        if not level:
            return name or ""
        parts = self.name.split(".")
        if not self.is_package:
            level += 1
        parts = parts[: len(parts) - level + 1]
        return ".".join([*parts, *([name] if name else [])])


def _locate(path: str) -> tuple[_Module, list[str]]:
    """Find the module that a dotted path begins with, and the names that follow."""
    first, *rest = path.split(".")
    try:
        spec = find_spec(first) if first.isidentifier() else None
    except ValueError:
        spec = None
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        raise NotFound(first)
    folders = [Path(each) for each in spec.submodule_search_locations or ()]
    module = _Module(first, Path(spec.origin), bool(folders))
    while rest and module.is_package:
        name = f"{module.name}.{rest[0]}"
        for folder in folders:
            if (package := folder / rest[0] / "__init__.py").is_file():
                module, folders = _Module(name, package, True), [package.parent]
                break
            if (file := folder / f"{rest[0]}.py").is_file():
                module = _Module(name, file, False)
                break
        else:
            break
        rest = rest[1:]
    return module, rest


@cache
def _statements(file: Path) -> tuple[ast.stmt, ...]:
    return tuple(_flat(ast.parse(file.read_bytes()).body))


def _flat(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Return a module's statements, also those under `if TYPE_CHECKING` and `try`."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try):
            yield from _flat(statement.body)
            yield from _flat(statement.orelse)


def _find_class(
    module: _Module, name: str, depth: int
) -> tuple[_Module, ast.ClassDef] | None:
    """Find a class where a module defines it, or where it imports it from."""
    if not depth:
        return None
    for statement in _statements(module.file):
        if isinstance(statement, ast.ClassDef) and statement.name == name:
            return module, statement
        if not isinstance(statement, ast.ImportFrom):
            continue
        for alias in statement.names:
            if name == (alias.asname or alias.name):
                source = module.absolute(statement.module, statement.level)
                try:
                    other, rest = _locate(source)
                except NotFound:
                    return None
                return None if rest else _find_class(other, alias.name, depth - 1)
    return None


def _binds(module: _Module, name: str) -> bool:
    """Return whether a module may have a name in another way than by a class."""
    for statement in _statements(module.file):
        if isinstance(statement, ast.FunctionDef) and statement.name in {
            name,
            "__getattr__",
        }:
            return True
        if isinstance(statement, ast.ImportFrom | ast.Import) and any(
            (alias.asname or alias.name) in {name, "*"} for alias in statement.names
        ):
            return True
        targets = getattr(statement, "targets", None) or [
            getattr(statement, "target", None)
        ]
        if any(isinstance(each, ast.Name) and each.id == name for each in targets):
            return True
    return False


def _of_method(module: _Module, found: ast.ClassDef, name: str) -> Signature | None:
    for statement in found.body:
        if (
            isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef)
            and statement.name == name
        ):
            signature = _of_arguments(statement.args)
            if not signature.is_open or not _only_passes_on(statement):
                return signature
            if name != "__init__":
                # What a class method passes on goes to the class.
                return signature.with_more(_of_method(module, found, "__init__"))
            return signature.with_more(_of_bases(module, found, name))
    return _of_bases(module, found, name)


def _only_passes_on(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Return whether the `**kwargs` of a function are nothing but passed on."""
    name = function.args.kwarg.arg if function.args.kwarg else ""
    nodes = [node for statement in function.body for node in ast.walk(statement)]
    used = [n for n in nodes if isinstance(n, ast.Name) and n.id == name]
    passed = [n.value for n in nodes if isinstance(n, ast.keyword) and n.arg is None]
    return all(any(each is value for value in passed) for each in used)


def _of_bases(module: _Module, found: ast.ClassDef, name: str) -> Signature | None:
    for base in found.bases:
        if isinstance(base, ast.Subscript):
            base = base.value
        if not isinstance(base, ast.Name):
            continue
        parent = _find_class(module, base.id, _DEPTH)
        if parent and (signature := _of_method(*parent, name)):
            return signature
    return None


def _of_arguments(args: ast.arguments) -> Signature:
    positional = [arg.arg for arg in (*args.posonlyargs, *args.args)][1:]
    keyword = [arg.arg for arg in args.kwonlyargs]
    optional = {
        *positional[len(positional) - len(args.defaults) :],
        *(
            arg.arg
            for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)
            if default is not None
        ),
    }
    if not args.defaults:
        optional.difference_update(positional)
    names = {*positional, *keyword}
    names.discard(_session_parameter(positional, [*positional, *keyword]) or "")
    return Signature(
        frozenset(names), frozenset(names - optional), args.kwarg is not None
    )
