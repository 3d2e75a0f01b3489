"""Build the book: ``python book/build.py``.

1. Run every notebook whose result may have changed (`execute`, `freshness`).
2. Gather prose, executed notebooks, the students' sheets and generated pages in
   ``_build/source``.
3. Let Jupyter Book turn them into HTML, with every warning an error.

If nothing has changed since the last good build, only the checks run.
"""

import base64
import hashlib
import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pages
from execute import TABLES, Chapter, run_stale

TOP = Path(__file__).resolve().parent.parent
BUILD = TOP / "_build"
COPIED = (
    "_config.yml",
    "_toc.yml",
    "book/_static/*",
    "book/*.md",
    "book/references.bib",
    "book/quiet_pages.py",
    "book/figure_texts.py",
)
TOOLS = ("jupyter-book", "sphinx", "sphinx-book-theme", "myst-nb")


def main() -> int:
    """Build the book.

    Returns:
        The exit status: 0 if the book is built.
    """
    chapters, failed = run_stale(TOP, BUILD / "notebooks")
    if failed:
        print(f"{failed} of {len(chapters)} notebooks failed: no book", file=sys.stderr)
        return 1
    if not make_sheets():
        return 1
    content = gather(chapters)
    write_tree(BUILD / "source", content)
    if not make_html(content):
        return 1
    print(f"The book is at {(BUILD / 'html' / 'index.html').as_uri()}")
    return 0


def gather(chapters: list[Chapter]) -> dict[str, bytes]:
    """All files of the book's source, by their path in it."""
    content = {
        path.relative_to(TOP).as_posix(): path.read_bytes()
        for pattern in COPIED
        for path in TOP.glob(pattern)
    }
    for chapter in chapters:
        content[f"notebooks/{chapter.source.name}"] = page_of(chapter)
    content["book/cover.png"] = cover(chapters)
    for path in (BUILD / "notebooks" / name for name in TABLES):
        if path.is_file():
            content[f"notebooks/{path.name}"] = path.read_bytes()
    for path in students_sheets().values():
        content[f"book/sheets/{path.name}"] = path.read_bytes()
    content["book/status.md"] = pages.status(chapters).encode()
    for name, page in pages.api(TOP).items():
        content[name] = page.encode()
    return content


def students_sheets() -> dict[Path, Path]:
    """The students' copy of each sheet, by the master it is made from."""
    masters = sorted((TOP / "notebooks" / "coursework").glob("*.ipynb"))
    folder = BUILD / "coursework" / "students"
    return {master: folder / master.name for master in masters}


def make_sheets() -> bool:
    """Make the students' copies again where the master is newer.

    Returns:
        Whether all could be made.
    """
    stale = [
        master.stem
        for master, copy in students_sheets().items()
        if not copy.is_file() or copy.stat().st_mtime < master.stat().st_mtime
    ]
    program = TOP / "notebooks" / "coursework" / "assign.py"
    command = [sys.executable, str(program), "--no-run", *stale]
    if stale and subprocess.run(command).returncode:
        print("Not all sheets could be made, see above: no book", file=sys.stderr)
        return False
    return True


def page_of(chapter: Chapter) -> bytes:
    """The executed notebook without the cell in which papermill sets its parameters."""
    notebook = json.loads(chapter.target.read_text(encoding="utf-8"))
    notebook["cells"] = [
        cell
        for cell in notebook["cells"]
        if "injected-parameters" not in cell["metadata"].get("tags", [])
    ]
    return json.dumps(notebook, indent=1).encode()


def cover(chapters: list[Chapter]) -> bytes:
    """The first page's picture: the figure of the only cell that is tagged "cover"."""
    (cell,) = (
        cell
        for chapter in chapters
        for cell in json.loads(chapter.target.read_text(encoding="utf-8"))["cells"]
        if "cover" in cell["metadata"].get("tags", [])
    )
    (figure,) = (out["data"] for out in cell["outputs"] if "data" in out)
    return base64.b64decode(figure["image/png"])


def write_tree(folder: Path, content: dict[str, bytes]) -> None:
    """Make a folder hold exactly these files, and touch only those that differ."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        if path.relative_to(folder).as_posix() not in content:
            path.unlink()
    for name, data in content.items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != data:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def make_html(content: dict[str, bytes]) -> bool:
    """Run Jupyter Book if anything differs from the last good build.

    It starts from nothing each time: an incremental build would not repeat the warnings
    of pages that did not change, and would leave their navigation out of date.

    Returns:
        Whether the HTML is good.
    """
    built, html = BUILD / "built.json", BUILD / "html"
    state = json.dumps(fingerprint(content), sort_keys=True)
    if html.is_dir() and built.is_file() and built.read_text() == state:
        print("pages are up to date")
        return True
    built.unlink(missing_ok=True)
    for folder in (html, BUILD / ".doctrees", BUILD / "jupyter_execute"):
        shutil.rmtree(folder, ignore_errors=True)
    program = Path(sys.executable).with_name("jupyter-book")
    command = [str(program), "build", str(BUILD / "source")]
    command += ["--path-output", str(TOP), "-W", "-n", "--keep-going", "-q"]
    print("building the pages", flush=True)
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        print("The pages have errors or warnings, see above", file=sys.stderr)
        return False
    built.write_text(state)
    return True


def fingerprint(content: dict[str, bytes]) -> dict[str, str]:
    """A hash of everything the HTML is made from: sources, docstrings and tools."""
    parts = dict(content)
    for path in (TOP / "nlhelpers").rglob("*.py"):
        parts[path.relative_to(TOP).as_posix()] = path.read_bytes()
    state = {name: hashlib.sha256(data).hexdigest() for name, data in parts.items()}
    return state | {tool: version(tool) for tool in TOOLS}


if __name__ == "__main__":
    sys.exit(main())
