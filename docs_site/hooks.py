"""MkDocs' hooks: they make a site of the Markdown files that also read well on a code host.

Pages outside docs/ become pages of the site, README.md its home. Other files that a page links to get a page
that shows them. Links are rewritten to these pages; a link to something that is not there stays as it is, so
that MkDocs refuses it.
"""

from __future__ import annotations

import csv
import json
import os
import posixpath
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import mdformat
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, InclusionLevel
from pygments.lexers import get_lexer_for_filename
from pygments.util import ClassNotFound

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT: Final = Path(__file__).parent.parent
PICTURES: Final = frozenset({".png", ".jpg", ".svg", ".gif", ".webp"})
HOME: Final = "README.md"
SITE_ONLY: Final = "docs_site/pages/"
"""Pages that only the site has: what plugins fill in would be empty on a code host."""

FENCED: Final = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)
LINK: Final = re.compile(r'(?P<before>\]\(|<img [^>]*src=")(?P<link>[^)"\s]+)')
PICTURE: Final = re.compile(
    r'<picture>\s*<source media="\(prefers-color-scheme: dark\)" srcset="(?P<dark>[^"]+)">\s*'
    r'<img alt="(?P<alt>[^"]*)" src="(?P<light>[^"]+)">\s*</picture>'
)
EXTERNAL: Final = re.compile(r"[a-z]+:|#")
LESS_SOUGHT: Final = ("docs/decisions/", "CHANGELOG.md")
"""Search ranks these pages lower: they hold every word, but seldom the answer."""

STYLE: Final = "site.css"
FILE_PAGE: Final = "---\nsearch: {exclude: true}\nhide: [navigation, toc]\n---\n"
"""A page that shows a file is not searched, and has the whole width."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the home page, the site's own pages, and whatever the pages link to."""
    for site_only in sorted((ROOT / SITE_ONLY).rglob("*.md")):
        _add(files, config, site_only.relative_to(ROOT).as_posix())
    _add(files, config, HOME)
    files.append(File.generated(config, STYLE, abs_src_path=str(ROOT / "docs_site" / STYLE)))
    unread = [_repository_path(file) for file in files.documentation_pages()]
    while unread:
        page = unread.pop()
        for link in _links(_two_themes((ROOT / page).read_text(encoding="utf-8"))):
            path = _target(page, link)
            if path is not None and files.get_file_from_path(site_path(path)) is None:
                _add(files, config, path)
                if path.endswith(".md"):
                    unread.append(path)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite a page for Python-Markdown: its links, its pictures for two themes, and its lists."""
    del config, files
    if page.file.abs_src_path is None:  # it shows a file, and links to nothing
        return markdown
    path = _repository_path(page.file)
    if path.startswith(LESS_SOUGHT):
        page.meta["search"] = {"boost": 0.5}
    if "```mermaid" in markdown:
        # Material would load Mermaid's script from another host.
        raise PluginError(f"{path}: draw the diagram as an SVG; the site has no Mermaid")
    markdown = _two_themes(markdown)
    if re.search(r"^\s*<picture", markdown, re.MULTILINE):
        raise PluginError(f"{path}: write <picture> as README.md does, for the site to know its two themes")
    parts = FENCED.split(markdown)
    parts[::2] = [LINK.sub(partial(_rewritten, path), part) for part in parts[::2]]
    # Python-Markdown wants a blank line before a list, and four spaces for each level.
    return str(mdformat.text("".join(parts), options={"number": True}, extensions={"mkdocs", "tables"}))


def site_path(path: str) -> str:
    """The place in the site's sources of a file of the repository; both relative, with slashes.

    Pages and pictures keep their path, that of docs/ without `docs/`. Everything else is shown below source/.
    """
    if path == HOME:
        return "index.md"
    if path.endswith(".md") or Path(path).suffix in PICTURES:
        return path.removeprefix(SITE_ONLY).removeprefix("docs/")
    return f"source/{path}.md"


def _repository_path(file: File) -> str:
    return Path(str(file.abs_src_path)).relative_to(ROOT).as_posix()


def _add(files: Files, config: MkDocsConfig, path: str) -> None:
    place = site_path(path)
    if place.startswith("source/"):
        shown = FILE_PAGE + _shown(path)
        files.append(File.generated(config, place, content=shown, inclusion=InclusionLevel.NOT_IN_NAV))
    else:
        files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))


def _shown(path: str) -> str:
    """A page that shows a folder's names, a notebook, a CSV's table, or a file's text."""
    file = ROOT / path
    title = f"# `{path}`\n\n"
    if file.is_dir():
        names = sorted(
            each.name + "/" * each.is_dir() for each in file.iterdir() if each.name != "__pycache__"
        )
        return title + "".join(f"- `{name}`\n" for name in names)
    if file.suffix == ".ipynb":
        return _notebook(path)
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".csv":
        head, *rows = [[cell.replace("|", "\\|") for cell in row] for row in csv.reader(text.splitlines())]
        return title + "".join(f"| {' | '.join(row)} |\n" for row in [head, ["---"] * len(head), *rows])
    return f"{title}`````{_language(file.name)}\n{text}\n`````\n"


def _notebook(path: str) -> str:
    """A notebook's cells, and the outputs that its file keeps."""
    parts = []
    for cell in json.loads((ROOT / path).read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(LINK.sub(partial(_rewritten, path), source))
            continue
        parts.append(f"```python\n{source}\n```")
        parts += [_output(output) for output in cell["outputs"]]
    return "\n\n".join(parts) + "\n"


def _output(output: dict[str, Any]) -> str:
    """What a cell printed or answered; a picture is part of the page."""
    data = output.get("data", {})
    if "image/jpeg" in data:
        encoded = "".join(data["image/jpeg"].split())
        return f"![The picture that the cell shows](data:image/jpeg;base64,{encoded})"
    return f"```text\n{''.join(data.get('text/plain', output.get('text', ())))}\n```"


def _language(name: str) -> str:
    """Pygments' name of a file's language."""
    try:
        return str(get_lexer_for_filename(name).aliases[0])
    except ClassNotFound:
        return "text"


def _links(markdown: str) -> list[str]:
    return [match["link"] for part in FENCED.split(markdown)[::2] for match in LINK.finditer(part)]


def _target(page: str, link: str) -> str | None:
    """The path in the repository that a page's link names; None if it leads elsewhere or to nothing."""
    if EXTERNAL.match(link):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), link.partition("#")[0]))
    inside = not path.startswith("../") and (ROOT / path).exists()
    return path if inside else None


def _rewritten(page: str, match: re.Match[str]) -> str:
    """A link as MkDocs wants it: from the page's source in the site to the target's."""
    link = match["link"]
    path = _target(page, link)
    if path is None:
        return match[0]
    _, mark, anchor = link.partition("#")
    here = posixpath.dirname(site_path(page)) or os.curdir
    return f"{match['before']}{posixpath.relpath(site_path(path), here)}{mark}{anchor}"


def _two_themes(markdown: str) -> str:
    """Replace each `<picture>` by two images: the theme chosen on the page may not be the system's."""
    return PICTURE.sub(r"![\g<alt>](\g<light>#only-light)\n![\g<alt>](\g<dark>#only-dark)", markdown)
