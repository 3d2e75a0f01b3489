"""Which notebooks have to run again: a content key for each.

A notebook's key is a hash of

1. its own cells and metadata (but not outputs, ids or execution counts);
2. the source of the whole package: what a notebook does not import counts too, but the
   package is small, and each chapter imports nearly all of it;
3. the saved runs that its cells read, see `RECORDS`;
4. the versions in `VERSIONS`.

So the key always changes when the notebook's result can.
"""

import hashlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

VERSIONS = ("torch", "torchvision", "numpy", "scikit-learn", "pandas", "matplotlib")

# Saved runs, by the names that `nlhelpers.records` has for their folders. Nothing else
# in the package uses these names: a notebook that reads saved runs says so itself.
RECORDS = {"SAVED": "book/records/*.jsonl", "REPEATED": "book/records/repeated/*.jsonl"}


def notebook_key(notebook: Path, top: Path) -> str:
    """The content key of one notebook.

    Args:
        notebook: The .ipynb file.
        top: The repository, which holds the package and the records.

    Returns:
        A hash that changes when the notebook's result can; "" for a file that is not a
        notebook, as after a merge with conflicts. Running it will say so.
    """
    try:
        content = json.loads(notebook.read_text(encoding="utf-8"))
    except ValueError:
        return ""
    digest = hashlib.sha256()
    digest.update(json.dumps(essence(content), sort_keys=True).encode())
    digest.update(json.dumps(versions(), sort_keys=True).encode())
    files = [*(top / "nlhelpers").rglob("*.py"), *saved_runs(content, top)]
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
    """The parts of a notebook that decide its result and its page."""
    cells = [
        [cell["cell_type"], text(cell), cell.get("metadata", {})]
        for cell in content["cells"]
    ]
    return {"cells": cells, "metadata": content.get("metadata", {})}


def text(cell: dict) -> str:
    """The source of a cell as one string."""
    source = cell["source"]
    return source if isinstance(source, str) else "".join(source)


def saved_runs(content: dict, top: Path) -> list[Path]:
    """The files of saved runs that the cells of a notebook read."""
    cells = [text(cell) for cell in content["cells"] if cell["cell_type"] == "code"]
    return [
        path
        for name, files in RECORDS.items()
        if any(name in source for source in cells)
        for path in top.glob(files)
    ]
