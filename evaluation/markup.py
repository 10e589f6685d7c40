"""HTML and SVG from values, with every string escaped unless it is already markup.

What models write is hostile text: it reaches a page only through `element`, which escapes it. `Markup` is made here
and by joining Markup, never from text that came from outside.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable

Attribute = str | float | bool | None

_VOID = frozenset({"meta", "br", "hr", "col"})


class Markup(str):
    """A piece of HTML or SVG that needs no escaping."""

    __slots__ = ()


def element(name: str, /, *children: object, **attributes: Attribute) -> Markup:
    """`<name attributes>children</name>`.

    Children: Markup goes in as it is, iterables are flattened, None is left out, all else is escaped text. Attributes:
    `class_` is class, other underscores become hyphens, True is a bare attribute, None and False are left out. Numbers
    are written short.
    """
    written = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in _VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(children)}</{name}>")


def join(children: Iterable[object]) -> Markup:
    """The children one after the other, escaped as in `element`."""
    return Markup("".join(_child(child) for child in children))


def escape(text: str) -> Markup:
    """`text` as Markup: special characters as entities, control and direction-changing characters made visible."""
    if not text.isprintable():
        text = "".join(_visible(character) for character in text)
    return Markup(html.escape(text))


def _visible(character: str) -> str:
    # A right-to-left override could make a report read as what it is not; NUL and its kin are not allowed in HTML.
    if character in "\n\t" or unicodedata.category(character) not in {"Cc", "Cf", "Cs"} or character == "\u200d":
        return character
    return f"\\u{ord(character):04x}"


def _child(child: object) -> str:
    if child is None:
        return ""
    if isinstance(child, Markup):
        return child
    if isinstance(child, str):
        return escape(child)
    if isinstance(child, int | float):
        return escape(str(child))
    if isinstance(child, Iterable):
        return join(child)
    raise TypeError(f"{type(child).__name__} cannot be written as markup")


def _attribute(key: str, value: Attribute) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return f' {name}="{escape(text)}"'
