"""A Sphinx extension: figures have a text for readers who cannot see them.

It is the caption below a figure (a paragraph that begins in italics), or else the title
of the section. Otherwise a figure's text would be the name of its file.
"""

from docutils import nodes
from sphinx.application import Sphinx


def describe(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Give a text to every image that has none of its own."""
    for image in doctree.findall(nodes.image):
        if not image.get("alt"):
            image["alt"] = caption(image) or title(image)


def caption(image: nodes.image) -> str:
    """The next paragraph of the image's section if it begins in italics; else ""."""
    below = image.next_node(nodes.paragraph, siblings=True, ascend=True, descend=False)
    begins = below is not None and isinstance(below[0], nodes.emphasis)
    return " ".join(below.astext().split()) if begins else ""


def title(image: nodes.image) -> str:
    """The title of the image's section; "" on a page without one."""
    above = image.parent
    while above is not None and not isinstance(above, nodes.section):
        above = above.parent
    return "" if above is None else above[0].astext()


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect to Sphinx."""
    app.connect("doctree-resolved", describe)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
