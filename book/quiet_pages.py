"""A Sphinx extension: no page carries scripts for running its cells on a server.

Jupyter Book puts sphinx-thebe's scripts on every page, used or not, and one of them
twice, which is an error in the browser's console.
"""

from sphinx.application import Sphinx


def drop_thebe(
    app: Sphinx, page: str, template: str, context: dict, doctree: object
) -> None:
    """Take the scripts of sphinx-thebe out of a page's list of scripts."""
    context["script_files"] = [
        script
        for script in context["script_files"]
        if "thebe" not in f"{script.filename} {script.attributes.get('body')}".lower()
    ]


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect to Sphinx."""
    app.connect("html-page-context", drop_thebe, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
