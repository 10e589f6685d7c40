"""Links of the pages as the site of docs/ has them. Pure functions; docs/hooks.py gives them to mkdocs.

Pages link to files beside docs/ as a code host shows them: ../learners/ppo.py#L12, ../CONTRIBUTING.md. In the site
every such file is a page, so that a reader finds the code that a page speaks of, at its line, without a network and at
the page's own revision: Markdown as a page like the others, any other text as a listing with an anchor for each line.
"""

import re
from collections.abc import Callable
from pathlib import Path
from posixpath import normpath, relpath

PROJECT_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "SECURITY.md": "project/security.md",
    "bench/README.md": "project/benchmarks.md",
}
"""Pages from beside docs/, by path from the root, and where they are in the site. In README.md's place stands the
site's own home page, docs/index.md."""

FENCE = re.compile(r"(^[ \t]*```.*?^[ \t]*```)", re.MULTILINE | re.DOTALL)
"""A block of code, in which nothing is a link."""

_LINK = re.compile(r"\]\((?!https?:|mailto:|#)(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
_ELSEWHERE = re.compile(
    r"""<(?:script|img|iframe|source|video|audio)\b[^>]*\bsrc=["']?(?:https?:)?//[^"'\s>]+"""
    r"""|<link\b(?=[^>]*\brel=["']?(?:stylesheet|preload|preconnect|icon))[^>]*\bhref=["']?(?:https?:)?//[^"'\s>]+""",
    re.IGNORECASE,
)


def anchor_of(heading: str, separator: str = "-") -> str:
    """The anchor of a heading as code hosts make it: lower case, punctuation left out, a hyphen for each space."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", separator)


def origin_of(place: str) -> str:
    """The path from the root of the page that the site has at `place`."""
    beside = {page: source for source, page in PROJECT_PAGES.items() if source != "README.md"}
    return beside.get(place, f"docs/{place}")


def place_of(path: str) -> str:
    """Where the site has the file at `path` (from the root)."""
    if path in PROJECT_PAGES:
        return PROJECT_PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}.md"


def linked(text: str, origin: str) -> list[str]:
    """The files, by path from the root, that the page at `origin` links to."""
    found: list[str] = []

    def note(link: re.Match[str]) -> str:
        found.append(_target(link["path"], origin))
        return link[0]

    _in_links(text, note)
    return found


def relinked(text: str, place: str) -> str:
    """`text` of the page at `place` of the site with links that lead to the site's pages."""
    origin = origin_of(place)

    def in_site(link: re.Match[str]) -> str:
        target = place_of(_target(link["path"], origin))
        anchor = re.sub(r"^#L(?=\d)", "#L-", link["anchor"] or "")
        return f"]({relpath(target, Path(place).parent.as_posix())}{anchor})"

    return _in_links(text, in_site)


def loaded_from_elsewhere(html: str) -> list[str]:
    """The tags of `html` with which a browser would ask another host, without a click, for a part of the page."""
    return _ELSEWHERE.findall(html)


def _target(path: str, origin: str) -> str:
    return normpath(f"{Path(origin).parent.as_posix()}/{path}")


def _in_links(text: str, replace: Callable[[re.Match[str]], str]) -> str:
    return "".join(part if number % 2 else _LINK.sub(replace, part) for number, part in enumerate(FENCE.split(text)))
