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
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from nlhelpers.sources import PACKAGE, closure, imported, modules_below

VERSIONS = ("torch", "torchvision", "numpy", "scikit-learn", "pandas", "matplotlib")

# The one rule about saved runs: whoever imports one of these shows records.
RECORDS = "book/records"
RECORD_READERS = {f"{PACKAGE}.{name}" for name in ("report", "records", "papers")}


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
        if cell["cell_type"] == "code" and not installs(cell):
            wanted |= cell_imports(text(cell), top)
    return closure(wanted, top)


def installs(cell: dict) -> bool:
    """Whether a cell only fetches the package where it is missing, as on Colab."""
    return "install" in cell.get("metadata", {}).get("tags", [])


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
