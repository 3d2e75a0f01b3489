"""Which notebooks have to run again: a content key for each.

A notebook's key is a hash of

1. its own cells and metadata (but not outputs, ids or execution counts);
2. every module of the package that it imports, directly or through another module, read
   from the source without running it. Importing a module also runs the ``__init__`` of
   each package above it;
3. the data those modules read, see `data_files`;
4. the versions in `VERSIONS`.

So a key changes exactly when the notebook's result can.
"""

import ast
import hashlib
import json
import platform
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGE = "nlhelpers"
VERSIONS = ("torch", "torchvision", "numpy", "scikit-learn", "pandas", "matplotlib")

# The one rule about saved runs: whoever imports one of these shows records.
RECORDS = "book/records"
RECORD_READERS = {f"{PACKAGE}.{name}" for name in ("report", "records", "papers")}

# A module that imports by computed names may import all of its own package.
DYNAMIC = {"import_module", "__import__", "iter_modules", "walk_packages"}


def notebook_key(notebook: Path, top: Path) -> str:
    """The content key of one notebook.

    Args:
        notebook: The .ipynb file.
        top: The repository, which holds the package and the records.

    Returns:
        A hash that changes when the notebook's result can.
    """
    content = json.loads(notebook.read_text(encoding="utf-8"))
    modules = notebook_modules(content, top)
    digest = hashlib.sha256()
    digest.update(json.dumps(essence(content), sort_keys=True).encode())
    digest.update(json.dumps(versions(), sort_keys=True).encode())
    files = [*modules.values(), *data_files(modules, top)]
    for path in sorted(files):
        digest.update(f"\0{path.relative_to(top).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that compute the results."""
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def essence(content: dict) -> dict:
    """What of a notebook decides its result and its page."""
    cells = [
        [cell["cell_type"], text(cell), cell.get("metadata", {})]
        for cell in content["cells"]
    ]
    return {"cells": cells, "metadata": content.get("metadata", {})}


def text(cell: dict) -> str:
    """The source of a cell as one string."""
    source = cell["source"]
    return source if isinstance(source, str) else "".join(source)


def notebook_modules(content: dict, top: Path) -> dict[str, Path]:
    """Modules of the package that a notebook imports, directly or not.

    Args:
        content: The notebook, as parsed JSON.
        top: The repository.

    Returns:
        Dotted module names and their files.
    """
    wanted: set[str] = set()
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            wanted |= cell_imports(text(cell), top)
    return closure(wanted, top)


def cell_imports(source: str, top: Path) -> set[str]:
    """Names of the package that one code cell may import.

    A cell may use all of the package if it starts it as a program, mentions it in an
    IPython magic, or is not plain Python.
    """
    lines = source.splitlines()
    magic = [line for line in lines if line.lstrip().startswith(("%", "!"))]
    plain = "\n".join("" if line in magic else line for line in lines)
    if any(PACKAGE in line for line in magic):
        return set(modules_below(PACKAGE, top))
    try:
        tree = ast.parse(plain)
    except SyntaxError:
        return set(modules_below(PACKAGE, top))
    if any(starts_package(node) for node in ast.walk(tree)):
        return set(modules_below(PACKAGE, top))
    return set(imported(tree, package=""))


def starts_package(node: ast.AST) -> bool:
    """Whether a node is a string such as a command line with ``-m nlhelpers``."""
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
        return False
    return node.value == PACKAGE or f"-m {PACKAGE}" in node.value


def closure(wanted: Iterable[str], top: Path) -> dict[str, Path]:
    """The modules that importing `wanted` loads, with their files.

    Names outside the package, and names that are not modules, fall away.
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


def data_files(modules: dict[str, Path], top: Path) -> list[Path]:
    """Files other than source that loaded modules read.

    These are the files beside the ``__init__.py`` of each loaded package (the published
    tables lie there), and the saved runs if one of `RECORD_READERS` is loaded.
    """
    inits = [path for path in modules.values() if path.name == "__init__.py"]
    found = [
        path
        for init in inits
        for path in init.parent.iterdir()
        if path.is_file() and path.suffix not in {".py", ".pyc"}
    ]
    if RECORD_READERS & modules.keys():
        found += [path for path in (top / RECORDS).rglob("*") if path.is_file()]
    return found
