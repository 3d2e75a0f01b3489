"""The code that made a number: functions and classes, and what they name.

A record's source hash is made from these, so that it covers the code behind a number
and nothing else.
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
from types import ModuleType

PACKAGE = "nlhelpers"


def definitions(*wanted: object, besides: Iterable[object] = ()) -> dict[str, str]:
    """The code of functions and classes, and of all in the package that they name.

    A constant counts with its value. A dictionary of functions is a registry: which of
    its entries a run uses is for the caller to say, so that a new entry changes nothing
    for the runs that do not use it.

    Args:
        wanted: Functions and classes; those of other packages are dropped.
        besides: Functions and classes to leave out, with what only they name.

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
    """A function's or class's code, and the `a` and `a.b` it looks up, as pairs."""
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
    """A constant as text; None for what is not plain data, like the alias of a type."""
    try:
        return json.dumps(sorted(value) if isinstance(value, set) else value)
    except TypeError:
        return None


def code(source: str) -> str:
    """A source without comments, docstrings or empty lines outside strings."""
    lines = source.split("\n")
    in_string: set[int] = set()  # numbers of lines that end inside a string
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        (first, column), (last, _) = token.start, token.end
        if token.type == tokenize.COMMENT:
            lines[first - 1] = lines[first - 1][:column]
        in_string |= set(range(first, last))  # only strings span lines
    for node in filter(is_docstring, ast.walk(ast.parse(source))):
        first, last = node.lineno - 1, node.end_lineno - 1
        # Columns of a syntax tree count bytes.
        start = lines[first].encode()[: node.col_offset].decode()
        end = lines[last].encode()[node.end_col_offset :].decode()
        lines[first : last + 1] = [start + end, *[""] * (last - first)]
        in_string -= set(range(node.lineno, node.end_lineno))
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
