"""The book: what runs again after a change, its sources, and its built pages."""

import json
import os
import re
import subprocess
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from docutils import nodes, utils

import build
import execute
import figure_texts
import freshness
import pages
from browser import chromium, find_chromium
from nlhelpers import records
from nlhelpers.papers import TABLES

TOP = Path(__file__).resolve().parent.parent
HTML = TOP / "_build" / "html"
NOTEBOOKS = sorted((TOP / "notebooks").glob("*.ipynb"))

# ---------------------------------------------------------------- what runs again

TREE = {
    "nlhelpers/__init__.py": "",
    "nlhelpers/methods/plain.py": "",
    "book/records/runs.jsonl": "{}",
    "book/records/repeated/runs.jsonl": "{}",
}
CELLS = {
    "alone": ["import torch"],
    "saved": ["from nlhelpers import records as r", "r.read(r.SAVED)"],
    "results": ["from nlhelpers.records import *", "read(SAVED), read(REPEATED)"],
}


@pytest.fixture
def tree(tmp_path):
    for name, content in TREE.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (tmp_path / "notebooks").mkdir()
    for name, sources in CELLS.items():
        write_notebook(tmp_path / f"notebooks/{name}.ipynb", sources)
    return tmp_path


def write_notebook(path, sources):
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"name": "python3", "language": "python"}
    nbformat.write(notebook, path)


def keys(top):
    return {
        name: freshness.notebook_key(top / f"notebooks/{name}.ipynb", top)
        for name in CELLS
    }


def differing(before, after):
    return {name for name in CELLS if before[name] != after[name]}


@pytest.mark.parametrize(
    ("changed", "rerun"),
    {
        "nlhelpers/__init__.py": "alone saved results",
        "nlhelpers/methods/plain.py": "alone saved results",
        "book/records/runs.jsonl": "saved results",
        "book/records/repeated/runs.jsonl": "results",
        "notebooks/alone.ipynb": "alone",
    }.items(),
)
def test_a_change_reruns_exactly_what_depends_on_it(tree, changed, rerun):
    before = keys(tree)
    if changed.endswith(".ipynb"):
        write_notebook(tree / changed, ["import torch  # again"])
    else:
        (tree / changed).write_text(TREE[changed] + "\n# changed")
    assert differing(before, keys(tree)) == set(rerun.split())


def test_new_and_deleted_records_count(tree):
    before = keys(tree)
    (tree / "book/records/more.jsonl").write_text("{}")
    assert differing(before, keys(tree)) == {"saved", "results"}
    (tree / "book/records/more.jsonl").unlink()
    assert keys(tree) == before


def test_a_notebook_that_reads_saved_runs_says_so():
    """No function of the package reads them for it, and no cell names their folder."""
    for name, files in freshness.RECORDS.items():
        assert TOP / files == getattr(records, name) / "*.jsonl"
    for path in (TOP / "nlhelpers").rglob("*.py"):
        named = {name for name in freshness.RECORDS if name in path.read_text()}
        assert not named or path.name == "records.py", path
    for path in NOTEBOOKS:
        cells = nbformat.read(path, as_version=4).cells
        assert not any("book/" in c.source for c in cells if c.cell_type == "code")


def test_the_package_is_python_only():
    """What else lies in it would not be part of a key, nor be installed."""
    files = (TOP / "nlhelpers").rglob("[!.]*.*")
    assert {path.suffix for path in files} <= {".py", ".pyc"}


def test_outputs_do_not_count(tree):
    before = keys(tree)
    path = tree / "notebooks/saved.ipynb"
    content = json.loads(path.read_text())
    content["cells"][0]["outputs"] = [{"output_type": "stream", "text": "1"}]
    content["cells"][0]["execution_count"] = 3
    path.write_text(json.dumps(content))
    assert keys(tree) == before


def test_versions_count(tree, monkeypatch):
    before = keys(tree)
    monkeypatch.setattr(freshness, "versions", lambda: {"torch": "another"})
    assert not set(before.values()) & set(keys(tree).values())


# ---------------------------------------------------------------- running, writing


def test_notebooks_run_once_and_failures_leave_nothing(tmp_path, capsys):
    (tmp_path / "notebooks").mkdir()
    write_notebook(tmp_path / "notebooks/good.ipynb", ["print(6 * 7)"])
    write_notebook(tmp_path / "notebooks/bad.ipynb", ["x = 1", "unknown_name"])
    executed = tmp_path / "executed"
    executed.mkdir()
    (executed / "deleted.ipynb").write_text("{}")
    (executed / ".ipynb_checkpoints").mkdir()
    (executed / ".ipynb_checkpoints" / "good-checkpoint.ipynb").write_text("{}")

    _, failed = execute.run_stale(tmp_path, executed)
    assert failed == 1
    assert {path.name for path in executed.iterdir()} == {"good.ipynb", "good.json"}
    assert "42" in (executed / "good.ipynb").read_text()
    assert "bad.ipynb failed in cell 2: NameError" in capsys.readouterr().err

    (tmp_path / "notebooks/bad.ipynb").write_text("<<<<<<< HEAD")
    _, failed = execute.run_stale(tmp_path, executed)
    assert failed == 1
    assert "bad.ipynb failed (NotJSONError)" in capsys.readouterr().err

    (tmp_path / "notebooks/bad.ipynb").unlink()
    chapters, failed = execute.run_stale(tmp_path, executed)
    assert failed == 0
    assert "good.ipynb is up to date" in capsys.readouterr().out
    assert "good" in pages.status(chapters)


def test_a_sidecar_that_is_cut_off_counts_as_none(tmp_path):
    chapter = execute.Chapter(tmp_path / "source.ipynb", tmp_path / "a.ipynb")
    chapter.target.write_text("{}")
    chapter.sidecar.write_text('{"key": "ab')
    assert chapter.run_info() == {}


def test_the_machine_is_described_where_there_is_no_sysconf(monkeypatch):
    monkeypatch.delattr(os, "sysconf", raising=False)  # as on Windows
    assert execute.machine()["memory_gb"] >= 1


def test_a_sheet_that_cannot_be_made_ends_the_build(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "TOP", tmp_path)
    monkeypatch.setattr(build, "BUILD", tmp_path / "_build")
    monkeypatch.setattr(build, "run_stale", lambda top, executed: ([], 0))
    (tmp_path / "notebooks/coursework").mkdir(parents=True)
    (tmp_path / "notebooks/coursework/noise.ipynb").write_text("{}")
    (tmp_path / "notebooks/coursework/assign.py").write_text("raise SystemExit(1)")
    assert build.main() == 1
    assert "Not all sheets could be made, see above" in capsys.readouterr().err


def test_write_tree_touches_only_what_differs(tmp_path):
    build.write_tree(tmp_path, {"a": b"1", "b/c": b"2", "d": b"3"})
    times = {name: (tmp_path / name).stat().st_mtime_ns for name in ("a", "b/c")}
    build.write_tree(tmp_path, {"a": b"1", "b/c": b"changed"})
    assert (tmp_path / "a").stat().st_mtime_ns == times["a"]
    assert (tmp_path / "b/c").read_bytes() == b"changed"
    assert not (tmp_path / "d").exists()


def test_pages_are_made_again_only_when_something_differs(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "BUILD", tmp_path)
    calls = []

    def made(command, **options):
        calls.append(command)
        (tmp_path / "html").mkdir()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(build.subprocess, "run", made)
    for content in ({"a": b"1"}, {"a": b"1"}, {"a": b"2"}, {"a": b"2"}):
        assert build.make_html(content)
    assert len(calls) == 2
    (tmp_path / "built.json").write_text('{"a": "cut o')
    assert build.make_html({"a": b"2"})
    assert len(calls) == 3


# ---------------------------------------------------------------- the sources


def toc_files(node):
    """All `file` entries of a table of contents."""
    if isinstance(node, list):
        return [name for part in node for name in toc_files(part)]
    if not isinstance(node, dict):
        return []
    below = [name for part in node.values() for name in toc_files(part)]
    return [node["file"], *below] if "file" in node else below


def test_the_table_of_contents_names_every_page_and_no_other():
    toc = yaml.safe_load((TOP / "_toc.yml").read_text())
    listed = {toc["root"], *toc_files(toc)}
    prose = {f"book/{path.stem}" for path in (TOP / "book").glob("*.md")}
    chapters = {f"notebooks/{path.stem}" for path in NOTEBOOKS}
    assert listed == prose | chapters | {"book/api", "book/status"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_form(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert tagged == code[1:2], (
        "the second code cell, and only it, is tagged parameters"
    )
    for number, cell in enumerate(code, 1):
        assert not cell.outputs, f"code cell {number} is stored with outputs"
        assert cell.execution_count is None, f"code cell {number} has a count"
        lines = len(cell.source.splitlines())
        assert lines <= 25, f"code cell {number} has {lines} lines, over 25"
    prose = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    hidden = [line for line in prose.splitlines() if line.startswith("%")]
    assert not hidden, "MyST takes a line that begins with % for a comment"
    assert 3 <= prose.count("{exercise}") == prose.count("{solution}") <= 5
    assert "## Key takeaways" in prose


def test_one_figure_of_the_chapters_is_tagged_as_the_cover():
    cells = [
        cell
        for path in NOTEBOOKS
        for cell in nbformat.read(path, as_version=4).cells
        if "cover" in cell.metadata.get("tags", [])
    ]
    assert [cell.source.count("plt.show()") for cell in cells] == [1]


def test_the_first_page_shows_the_cell_tagged_as_the_cover(tmp_path):
    first, second = (execute.Chapter(tmp_path, tmp_path / name) for name in "ab")
    text = nbformat.v4.new_output("stream", text="1 epoch")
    for chapter, png, tags in ((first, "ZG9n", []), (second, "Y2F0", ["cover"])):
        figure = nbformat.v4.new_output("display_data", {"image/png": png})
        cell = nbformat.v4.new_code_cell(outputs=[text, figure])
        cell.metadata["tags"] = tags
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), chapter.target)
    assert build.cover([first, second]) == b"cat"


def test_a_figure_is_described_by_its_caption_or_else_its_section():
    captioned, alone, named = (nodes.image() for _ in range(3))
    named["alt"] = "a cat"
    caption = nodes.paragraph(
        "", "", nodes.emphasis("", "Two\nlines"), nodes.Text(" ...")
    )
    body = nodes.container("", nodes.container("", captioned)), caption
    below = nodes.section(
        "", nodes.title("", "Cats"), nodes.container("", alone), named
    )
    below += nodes.paragraph("", "No caption.")
    doctree = utils.new_document("page")
    doctree += nodes.section("", nodes.title("", "Animals"), *body, below)
    figure_texts.describe(None, doctree, "page")
    assert [image["alt"] for image in (captioned, alone, named)] == [
        "Two lines ...",
        "Cats",
        "a cat",
    ]


def test_where_there_is_no_triton_no_page_is_about_it(monkeypatch):
    everything = pages.public_modules(TOP / "nlhelpers")
    assert "kernels" in everything
    monkeypatch.setattr(pages.importlib.util, "find_spec", lambda name: None)
    assert everything.keys() - pages.public_modules(TOP / "nlhelpers") == {"kernels"}


# ---------------------------------------------------------------- the built pages


def built_pages():
    """All pages of the last good build, but the redirection that is index.html."""
    if not (TOP / "_build" / "built.json").is_file():
        return []
    found = {path for path in HTML.rglob("*.html") if "_static" not in path.parts}
    return sorted(found - {HTML / "index.html"})


@pytest.fixture(scope="module")
def browser():
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium or Chrome found; CHROMIUM can name one")
    with chromium(program) as tab:
        yield tab


needs_book = pytest.mark.skipif(not built_pages(), reason="no book: run `make book`")


@needs_book
@pytest.mark.parametrize(
    "page", built_pages(), ids=lambda page: page.relative_to(HTML).as_posix()
)
def test_page_opens_without_errors_or_network(browser, page):
    visit = browser.open(page.as_uri())
    assert visit.errors == []
    assert [
        url for url in visit.requests if not url.startswith(("file:", "data:"))
    ] == []
    assert visit.report["broken"] == []
    assert visit.report["typeset"] == visit.report["formulas"]
    assert visit.report["bad_formulas"] == 0


@needs_book
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_page_shows_every_figure(browser, path):
    executed = nbformat.read(TOP / "_build/notebooks" / path.name, as_version=4)
    figures = sum(
        any(kind.startswith("image/") for kind in output.get("data", {}))
        for cell in executed.cells
        for output in cell.get("outputs", [])
    )
    visit = browser.open((HTML / "notebooks" / f"{path.stem}.html").as_uri())
    assert visit.report["images"] >= figures


@needs_book
def test_all_results_can_be_downloaded():
    files = {path.suffix: path for path in (HTML / "_downloads").rglob("tables.*")}
    rows = json.loads(files[".json"].read_text())
    places = {(row["table"], row["row"], row["column"]) for row in rows}
    assert places == {
        (name, cell.row, cell.column)
        for name, table in TABLES.items()
        for cell in table.cells
    }
    assert len(pd.read_csv(files[".csv"])) == len(rows)


@needs_book
def test_index_leads_to_the_first_page():
    target = re.search(r'url=([^"]+)"', (HTML / "index.html").read_text()).group(1)
    assert (HTML / target).is_file()


@needs_book
def test_browser_reports_what_is_wrong(browser, tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text("<img src='none.png'><script>console.error('no'); x.y</script>")
    visit = browser.open(bad.as_uri())
    assert len(visit.report["broken"]) == 1
    assert any("no" in error for error in visit.errors)
    assert any("x is not defined" in error for error in visit.errors)
