"""The hooks that mkdocs.yml names: pages for what lies beside docs/, and links to them (docs/links.py).

A link that leads to no file ends the build, as does a page that would load anything from another host; of broken
links within the site and of anchors mkdocs warns, and its strict mode ends the build too.
"""

from pathlib import Path

from links import PROJECT_PAGES, anchor_of, linked, loaded_from_elsewhere, origin_of, place_of, relinked
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Headings get the anchors that code hosts give them, so that links to them hold in both places."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = anchor_of
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of PROJECT_PAGES, and a listing of each file beside docs/ that a page links to."""
    root = Path(config.config_file_path).parent
    for source, place in PROJECT_PAGES.items():
        if files.get_file_from_path(place) is None:
            files.append(File.generated(config, place, content=(root / source).read_text(encoding="utf-8")))
    for page in files.documentation_pages():
        origin = origin_of(page.src_uri)
        for path in linked(page.content_string, origin):
            if files.get_file_from_path(place_of(path)) is not None or path.startswith("docs/"):
                continue  # of a page in docs/ that is not there mkdocs itself tells
            if not (root / path).is_file():
                raise PluginError(f"{origin} links to {path}, which is no file of the project.")
            listing = listed((root / path).read_text(encoding="utf-8"), path)
            files.append(File.generated(config, place_of(path), content=listing, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links of `markdown` as they are in the site."""
    return markdown if page.file.src_uri.startswith("source/") else relinked(markdown, page.file.src_uri)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Ends the build where a page would load something from elsewhere."""
    found = loaded_from_elsewhere(output)
    if found:
        raise PluginError(f"{page.file.src_uri} would load from elsewhere: {found[0]}")
    return output


def listed(text: str, path: str) -> str:
    """The page of the file at `path`: its `text`, each line with its number, and the anchor L-N that links have."""
    try:
        lexer = get_lexer_for_filename(path)
    except ClassNotFound:
        lexer = TextLexer()
    html = highlight(text, lexer, HtmlFormatter(linenos="inline", lineanchors="L", cssclass="highlight source"))
    return f"---\ntitle: {path}\nsearch: {{exclude: true}}\nhide: [navigation, toc]\n---\n\n# `{path}`\n\n{html}"
