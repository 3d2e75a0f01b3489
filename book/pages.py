"""The pages that are generated: the status page and the API reference."""

import ast
import importlib.util
import re
from pathlib import Path

from execute import Chapter

PACKAGE = "nlhelpers"

# The reading order of the reference; others follow by name.
ORDER = (
    "noise",
    "losses",
    "models",
    "data",
    "batches",
    "files",
    "crawled",
    "clothing1m",
    "food101n",
    "training",
    "pretraining",
    "methods",
    "evaluation",
    "profiles",
    "sources",
    "records",
    "specs",
    "experiments",
    "grids",
    "papers",
    "report",
    "parameters",
)

STATUS = """# Status

Every chapter was run from its first cell to its last before its page was made. This is
when, where and with what.

{runs}

## Machine

{machines}

## Versions

{versions}
"""

API = """# The package nlhelpers

These pages are generated from the source.

{table}
"""

MODULE = """# {title}

{body}
"""

# Names that a package only re-exports are described where they are defined. The two
# excluded are scikit-learn's own, which it adds to every estimator.
AUTOMODULE = """```{{eval-rst}}
.. automodule:: {name}
   :members:
   :exclude-members: set_fit_request, set_score_request
   :ignore-module-all:
```"""


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def status(chapters: list[Chapter]) -> str:
    """The status page: each notebook's run time, machine, versions, date and commit."""
    infos = {chapter.source.stem: chapter.run_info() for chapter in chapters}
    runs = [
        [
            f"{{doc}}`/notebooks/{name}`",
            duration(info["seconds"]),
            info["date"].replace("T", " ").replace("+00:00", " UTC"),
            f"`{info['commit']}`",
        ]
        for name, info in infos.items()
    ]
    head = ["Chapter", "Run time", "Finished", "Commit"]
    return STATUS.format(
        runs=table(head, runs),
        machines=grouped(infos, "machine"),
        versions=grouped(infos, "versions"),
    )


def grouped(infos: dict[str, dict], part: str) -> str:
    """One small table for each distinct value of a part of the run infos."""
    groups: dict[tuple, list[str]] = {}
    for name, info in infos.items():
        groups.setdefault(tuple(info[part].items()), []).append(name)
    blocks = []
    for values, names in groups.items():
        if len(groups) > 1:
            blocks.append("For " + ", ".join(f"`{name}`" for name in names) + ":")
        rows = [[key.replace("_gb", " in GB"), str(value)] for key, value in values]
        blocks.append(table([part.removesuffix("s").capitalize(), ""], rows))
    return "\n\n".join(blocks)


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def api(top: Path) -> dict[str, str]:
    """The API reference.

    Returns:
        Pages by their path: one that lists all modules, and one for each.
    """
    found = public_modules(top / PACKAGE)
    rows = [[f"{{doc}}`api/{name}`", summary(path)] for name, path in found.items()]
    content = {
        "book/api.md": API.format(table=table(["Module", "What it holds"], rows))
    }
    for name, path in found.items():
        content[f"book/api/{name}.md"] = module_page(name, path)
    return content


def module_page(name: str, path: Path) -> str:
    """The page of a module; that of a package has a section for each module in it."""
    blocks = [AUTOMODULE.format(name=f"{PACKAGE}.{name}")]
    if path.name == "__init__.py":
        for below in sorted(path.parent.glob("[!_]*.py")):
            full = f"{name}.{below.stem}"
            blocks += [f"## {full}", AUTOMODULE.format(name=f"{PACKAGE}.{full}")]
    return MODULE.format(title=name, body="\n\n".join(blocks))


def public_modules(folder: Path) -> dict[str, Path]:
    """Modules of the package with their files, in reading order.

    The one written in Triton is left out where Triton is missing: torch brings it on
    Linux only.
    """
    paths = [*folder.glob("[!_]*.py"), *folder.glob("[!_]*/__init__.py")]
    found = {
        path.parent.name if path.name == "__init__.py" else path.stem: path
        for path in paths
    }
    if importlib.util.find_spec("triton") is None:
        found.pop("kernels", None)
    known = [name for name in ORDER if name in found]
    return {name: found[name] for name in [*known, *sorted(found.keys() - set(known))]}


def summary(path: Path) -> str:
    """The first line of a module's docstring."""
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return re.sub(r":\w+:", "", doc.partition("\n")[0])
