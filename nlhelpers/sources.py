"""What code depends on: a notebook on modules, a number on functions and classes.

The build of the book asks for the modules, without running any, so that it reruns what
a change concerns. A record's source hash asks for the functions and classes, so that it
covers the code behind a number and nothing else. Nothing heavy is imported here.
"""

import ast
import inspect
import io
import json
import symtable
import sys
import textwrap
import tokenize
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

PACKAGE = "nlhelpers"

# A module that imports by computed names may import all of its own package.
DYNAMIC = {"import_module", "__import__", "iter_modules", "walk_packages"}


# Modules: what a notebook imports


def closure(wanted: Iterable[str], top: Path) -> dict[str, Path]:
    """The modules that importing `wanted` loads, with their files.

    Names outside the package, and names that are not modules, fall away.

    Args:
        wanted: Dotted names.
        top: The folder that holds the package.
    """
    found: dict[str, Path] = {}
    todo = list(wanted)
    while todo:
        name = todo.pop()
        if name in found or name.split(".")[0] != PACKAGE:
            continue
        if "." in name:
            todo.append(name.rpartition(".")[0])
        path = module_file(name, top)
        if path is not None:
            found[name] = path
            todo += module_imports(name, path, top, path.stat().st_mtime_ns)
    return found


def module_file(name: str, top: Path) -> Path | None:
    """The file of a dotted module name; None if there is no such module."""
    base = top.joinpath(*name.split("."))
    candidates = (base / "__init__.py", base.with_name(f"{base.name}.py"))
    return next((path for path in candidates if path.is_file()), None)


def modules_below(name: str, top: Path) -> Iterator[str]:
    """Names of a package and of all modules inside it."""
    folder = top.joinpath(*name.split("."))
    for path in folder.rglob("*.py"):
        parts = path.relative_to(top).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def module_imports(name: str, path: Path, top: Path, mtime: int) -> list[str]:
    """What a module may import; `mtime` only marks the version that was read."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    names = list(imported(tree, package))
    if DYNAMIC & {name_of(node) for node in ast.walk(tree)}:
        names += modules_below(package, top)
    return names


def name_of(node: ast.AST) -> str | None:
    """The identifier that a node uses, if any."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name):
            return name
    return None


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Dotted names that the import statements of a tree may load, at any depth.

    Args:
        tree: Parsed source.
        package: The package that relative imports start from.

    Yields:
        For ``import a.b``: ``a.b``. For ``from a import b``: ``a`` and ``a.b``, because
        ``b`` may be a module.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node, package)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def absolute(node: ast.ImportFrom, package: str) -> str:
    """The dotted name that a ``from … import`` starts from."""
    if not node.level:
        return node.module or ""
    parts = package.split(".")
    parts = parts[: len(parts) - node.level + 1]
    return ".".join([*parts, node.module] if node.module else parts)


# Definitions: what a number was made by


def definitions(*wanted: object, besides: Iterable[object] = ()) -> dict[str, str]:
    """The code of functions and classes, and of all in the package that it names.

    A constant counts with its value. A dictionary of functions is a registry: which of
    its entries a run uses is for the caller to say, so that a new entry changes nothing
    for the runs that do not use it.

    Args:
        wanted: Functions and classes; those of other packages fall away.
        besides: Functions and classes that are left out, with what only they name.

    Returns:
        Qualified names, each with its source as `code` gives it or its value as JSON.
    """
    found: dict[str, str] = {}
    left_out = set(map(qualified, besides))
    todo = list(wanted)
    while todo:
        thing = inspect.unwrap(todo.pop())
        name = qualified(thing)
        if name in found or name in left_out or not in_package(thing.__module__):
            continue
        found[name], references = parsed(thing)
        for constant, value in named(references, sys.modules[thing.__module__]):
            if inspect.isfunction(inspect.unwrap(value)) or inspect.isclass(value):
                todo.append(value)
            elif (data := as_json(value)) is not None:
                found[f"{thing.__module__}: {constant}"] = data
    return found


@cache  # the runs of a grid share most of their code
def parsed(thing: object) -> tuple[str, set[tuple[str, str | None]]]:
    """A function's or class's code, and the `a` and `a.b` that it looks up as pairs."""
    source = textwrap.dedent(inspect.getsource(thing))
    known = looked_up(source)
    references: set[tuple[str, str | None]] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Name(id=name) if name in known:
                references.add((name, None))
            case ast.Attribute(value=ast.Name(id=base), attr=name) if base in known:
                references.add((base, name))
    return code(source), references


def named(
    references: Iterable[tuple[str, str | None]], module: ModuleType
) -> Iterator[tuple[str, object]]:
    """What references stand for; of `a.b`, if `a` is a module of the package, `b`."""
    for base, name in references:
        if base not in vars(module):
            continue
        value = vars(module)[base]
        if name is None:
            yield base, value
        elif inspect.ismodule(value) and in_package(value.__name__):
            yield name, getattr(value, name)


def looked_up(source: str) -> set[str]:
    """Names in a source that are neither parameters nor local variables."""
    whole = symtable.symtable(source, "<source>", "exec")
    names = {symbol.get_name() for symbol in whole.get_symbols()}
    todo = whole.get_children()
    while todo:
        scope = todo.pop()
        symbols = scope.get_symbols()
        names |= {symbol.get_name() for symbol in symbols if symbol.is_global()}
        todo += scope.get_children()
    return names


def qualified(thing: object) -> str:
    """The dotted name of a function or class."""
    return f"{thing.__module__}.{thing.__qualname__}"


def in_package(module: str) -> bool:
    """Whether a dotted module name is this package's."""
    return module.split(".")[0] == PACKAGE


def as_json(value: object) -> str | None:
    """A constant as text; None for what is no plain data, like the alias of a type."""
    try:
        return json.dumps(sorted(value) if isinstance(value, set) else value)
    except TypeError:
        return None


def code(source: str) -> str:
    """A source without comments, docstrings and the empty lines outside of strings."""
    lines = source.split("\n")
    in_string: set[int] = set()  # numbers of lines that begin inside a string
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    nodes = list(ast.walk(ast.parse(source)))
    docstrings = [node for node in nodes if is_docstring(node)]
    texts = {id(node.value) for node in docstrings}
    for node in docstrings:
        first, last = node.lineno - 1, node.end_lineno - 1
        # Columns of a syntax tree count bytes.
        start = lines[first].encode()[: node.col_offset].decode()
        end = lines[last].encode()[node.end_col_offset :].decode()
        lines[first : last + 1] = [start + end, *[""] * (last - first)]
    for node in nodes:
        if isinstance(node, ast.Constant | ast.JoinedStr) and id(node) not in texts:
            in_string |= set(range(node.lineno + 1, node.end_lineno + 1))
    kept = (
        line if number in in_string else line.rstrip()
        for number, line in enumerate(lines, start=1)
        if line.strip() or number in in_string
    )
    return "\n".join(kept)


def is_docstring(node: ast.AST) -> bool:
    """Whether a node is a statement that is nothing but a string."""
    is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_text and isinstance(node.value.value, str)
