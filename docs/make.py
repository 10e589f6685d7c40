"""Brings the generated parts of the documentation up to date: `python docs/make.py`, from anywhere.

- docs/recipes.md: everything below its marker, from the recipe's own models.
- docs/observability.md: the same, from the metrics that are declared; and the dashboard in cluster/observability.
- docs/troubleshooting.md: everything below its marker, from the codes of problems.
- docs/operating.md: the supported versions, from cluster/supported.py.
- docs/quickstart.md: what was measured, copied from README.md.
- links to code in every page, [`symbol`](path.py#L12): the line where the symbol is defined now.

Tests hold both to what this script would write.
"""

from __future__ import annotations

import ast
import re
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

if TYPE_CHECKING:
    from amenable.error_codes import Code, Symptom

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "bench" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
README = ROOT / "README.md"
RECIPES = ROOT / "docs" / "recipes.md"
OBSERVABILITY = ROOT / "docs" / "observability.md"
DASHBOARD = ROOT / "cluster" / "observability" / "dashboard.json"
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"
QUICKSTART = ROOT / "docs" / "quickstart.md"
OPERATING = ROOT / "docs" / "operating.md"
MARKER = "<!-- Generated from here on: python docs/make.py -->"
COPIED = re.compile(
    r"(?P<begin><!-- Copied from README\.md, (?P<block>[\w-]+): python docs/make\.py -->\n).*?"
    r"(?P<end><!-- End of what is copied -->)",
    re.DOTALL,
)
SUPPORTED = re.compile(
    r"(?P<begin><!-- From cluster/supported\.py: python docs/make\.py -->\n).*?(?P<end><!-- To here -->)", re.DOTALL
)

UNITS = {
    "_s": "seconds",
    "_seconds": "seconds",
    "_hours": "hours",
    "_nats": "nats",
    "_bytes": "bytes",
    "_mib": "MiB",
    "_gib": "GiB",
    "_tokens": "tokens",
    "_characters": "characters",
    "_episodes": "episodes",
    "_length": "tokens",
    "_context": "tokens",
    "_steps": "steps",
    "_updates": "updates",
    "gpus": "GPUs",
    "threads": "threads",
}
"""The units that names of fields end with; other fields say theirs in their description."""

CODE_LINK = re.compile(r"\[`(?P<symbol>[\w.]+)`\]\((?P<path>[\w./-]+\.py)#L(?P<line>\d+)\)")


# links to code --------------------------------------------------------------------------------------------------


def line_of(source: str, symbol: str) -> int:
    """The line (from 1) on which `symbol` is defined in `source`: a module's name, or `Class.member`.

    Raises KeyError where there is no such definition.
    """
    body = _parsed(source).body
    line = 0
    for name in symbol.split("."):
        node = next((node for node in body if name in _defines(node)), None)
        if node is None:
            raise KeyError(symbol)
        line, body = node.lineno, getattr(node, "body", [])
    return line


@cache
def _parsed(source: str) -> ast.Module:
    return ast.parse(source)


def _defines(node: ast.stmt) -> list[str]:
    match node:
        case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            return [name]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
        case ast.Assign(targets=targets):
            return [target.id for target in targets if isinstance(target, ast.Name)]
    return []


def relinked(text: str, page: Path) -> str:
    """`text` of `page` with the present line in every link to code. KeyError or FileNotFoundError for a dead one."""

    def present(link: re.Match[str]) -> str:
        source = (page.parent / link["path"]).resolve().read_text(encoding="utf-8")
        return f"[`{link['symbol']}`]({link['path']}#L{line_of(source, link['symbol'])})"

    return CODE_LINK.sub(present, text)


# the fields of a recipe -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Use:
    """One place of a recipe where a group of settings stands."""

    path: str
    description: str
    values: BaseModel | None
    """The group as it is by default; None where by default there is none."""


def groups(recipe: BaseModel) -> dict[type[BaseModel], list[Use]]:
    """Every group of settings in `recipe`, in its order, with the places where it is used."""
    found: dict[type[BaseModel], list[Use]] = {}

    def visit(model: type[BaseModel], use: Use) -> None:
        found.setdefault(model, []).append(use)
        for name, field in model.model_fields.items():
            inner = inner_model(field.annotation)
            if inner is not None:
                value = default_of(model, name, use.values)
                path = f"{use.path}.{name}".removeprefix(".")
                visit(inner, Use(path, field.description or "", value if isinstance(value, BaseModel) else None))

    visit(type(recipe), Use("", "", recipe))
    return found


def default_of(model: type[BaseModel], name: str, values: BaseModel | None) -> Any:
    """What the field is by default, in the group `values` or, without one, in its model alone."""
    if values is not None:
        return getattr(values, name)
    field = model.model_fields[name]
    return ... if field.is_required() else field.get_default(call_default_factory=True)


def inner_model(annotation: Any) -> type[BaseModel] | None:
    """The group of settings that a field of this annotation holds, "or nothing" aside; None for a plain value."""
    members = [annotation, *_members(annotation)]
    return next((one for one in members if isinstance(one, type) and issubclass(one, BaseModel)), None)


def _members(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        for member in get_args(annotation):
            yield member
            yield from _members(member)


def recipe_fields(recipe: BaseModel) -> str:
    """The tables of docs/recipes.md: for every group its places, and for every field its default and its source."""
    return "\n".join(_section(model, uses) for model, uses in groups(recipe).items())


def _section(model: type[BaseModel], uses: list[Use]) -> str:
    paths = [use.path for use in uses]
    lines = [f"## {', '.join(f'`{path}`' for path in paths) if paths != [''] else 'The run'}", ""]
    lines += [" ".join(cleandoc(model.__doc__ or "").split("\n\n")[0].split()), ""]
    lines += [f"- `{use.path}`: {use.description}" for use in uses if use.path]
    lines += [""] if lines[-1] else []
    plain = {name: field for name, field in model.model_fields.items() if inner_model(field.annotation) is None}
    if not plain:
        return "\n".join(lines)
    defaults = {name: [shown(default_of(model, name, use.values)) for use in uses] for name in plain}
    if paths == [""]:  # the recipe was given what it requires, so that it could be made
        defaults |= {name: ["required"] for name, field in plain.items() if field.is_required()}
    same = all(len(set(values)) == 1 for values in defaults.values())
    heads = ["default"] if same else [f"`{path}`" for path in paths]
    lines += [_row(["field", "values", *heads, "what it is, and whose default"]), _row(["---"] * (3 + len(heads)))]
    for name, field in plain.items():
        columns = defaults[name][:1] if same else defaults[name]
        lines.append(_row([f"`{name}`", allowed(name, field), *columns, " ".join((field.description or "").split())]))
    return "\n".join([*lines, ""])


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def shown(value: Any) -> str:
    """A default as a recipe would say it."""
    if value is ...:
        return "required"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return re.sub(r"e-0", "e-", f"{value:g}")
    if isinstance(value, list | tuple):
        return f"[{', '.join(shown(one) for one in value)}]"
    return str(value)


def allowed(name: str, field: FieldInfo) -> str:
    """The values that a field takes, in words, with the unit that its name says: "number of seconds, > 0"."""
    unit = unit_of(name)
    kinds = list(dict.fromkeys(_kind(one) for one in _alternatives(field.annotation)))
    kinds = [f"{kind} of {unit}" if unit and kind.endswith("number") else kind for kind in kinds]
    words = ", ".join(kind for kind in kinds if kind != "null") + (" or null" if "null" in kinds else "")
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    limits = [
        f"{sign} {bound if isinstance(bound := getattr(limit, name), int) else f'{bound:g}'}"
        for limit in field.metadata
        for name, sign in signs.items()
        if hasattr(limit, name)
    ]
    return ", ".join([words, *limits])


def unit_of(name: str) -> str | None:
    """The unit in which a field is, where its name says that."""
    return next((unit for ending, unit in UNITS.items() if name.endswith(ending)), None)


def _alternatives(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [inner for member in get_args(annotation) for inner in _alternatives(member)]
    return [annotation]


def _kind(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{one}`" for one in get_args(annotation))
    if get_origin(annotation) is tuple:
        return f"list of {len(get_args(annotation))}"
    if get_origin(annotation) is dict:
        return "text by name"
    names = {int: "whole number", float: "number", bool: "true, false", str: "text", Path: "path", type(None): "null"}
    return names[annotation]


def recipes_page(text: str, recipe: BaseModel) -> str:
    """docs/recipes.md with the part below its marker written anew."""
    return _below_marker(text, RECIPES, recipe_fields(recipe))


def _below_marker(text: str, page: Path, generated: str) -> str:
    introduction, marker, _ = text.partition(MARKER)
    if not marker:
        raise ValueError(f"docs/{page.name} lacks the line {MARKER}")
    return f"{introduction}{MARKER}\n\n{generated}"


# the codes of problems ------------------------------------------------------------------------------------------


def troubleshooting_page(text: str, symptoms: Sequence[Symptom], http_codes: Sequence[Code]) -> str:
    """docs/troubleshooting.md with the part below its marker written anew: a table for each symptom."""
    tables = [(symptom.seen, symptom.codes) for symptom in symptoms]
    tables.append(("What the service answers over HTTP", tuple(http_codes)))
    return _below_marker(text, TROUBLESHOOTING, "\n".join(_codes(seen, codes) for seen, codes in tables))


def _codes(seen: str, codes: Sequence[Code]) -> str:
    lines = [f"## {seen}", "", _row(["code", "what it means", "what to do"]), _row(["---"] * 3)]
    lines += [_row([f"`{one.code}`", one.means, one.do]) for one in codes]
    return "\n".join([*lines, ""])


# metrics and dashboard ------------------------------------------------------------------------------------------


def metric_table() -> str:
    """The table of docs/observability.md: every declared metric under the name that Prometheus reads."""
    from actors.exported_metrics import RAY_PREFIX, declared

    lines = [_row(["metric", "kind", "tags", "what it is"]), _row(["---"] * 4)]
    for metric in declared().values():
        tags = ", ".join(f"`{tag}`" for tag in metric.tags)
        figures = ", ".join(f"`{figure}`" for figure in metric.figures)
        what = metric.description + (f" From {figures}." if figures else "")
        lines.append(_row([f"`{RAY_PREFIX}{metric.name}`", str(metric.kind), tags, what]))
    return "\n".join([*lines, ""])


def dashboard_json() -> str:
    """The dashboard as a file."""
    import json

    from cluster.dashboard import dashboard

    return json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"


# what other files say ---------------------------------------------------------------------------------------------


def quickstart_page(text: str, readme: str) -> str:
    """docs/quickstart.md with its copies of what stands between the comments of README.md's blocks.

    Raises KeyError for a block that README.md lacks."""

    def copied(place: re.Match[str]) -> str:
        block = re.search(rf"<!-- {place['block']} -->\n(.*?)<!-- /{place['block']} -->", readme, re.DOTALL)
        if block is None:
            raise KeyError(place["block"])
        return f"{place['begin']}\n{block[1].strip()}\n\n{place['end']}"

    return COPIED.sub(copied, text)


def supported_versions() -> str:
    """The table of docs/operating.md: what `amenable doctor` holds every node to."""
    from cluster.supported import MINIMUM_DRIVER, supported

    found = supported()
    rows = [["Python", found.python], *([f"`{name}`", version] for name, version in found.packages.items())]
    rows += [[f"NVIDIA driver, for CUDA {cuda}", f"≥ {driver}"] for cuda, driver in MINIMUM_DRIVER.items()]
    return "\n".join(map(_row, [["what", "version"], ["---", "---"], *rows]))


def operating_page(text: str) -> str:
    """docs/operating.md with the supported versions as they are."""
    return SUPPORTED.sub(lambda place: f"{place['begin']}\n{supported_versions()}\n\n{place['end']}", text)


def pages() -> dict[Path, str]:
    """Every page with its generated parts as they should be."""
    from amenable.error_codes import HTTP_CODES, SYMPTOMS
    from amenable.recipe import Recipe

    found = {page: relinked(page.read_text(encoding="utf-8"), page) for page in PAGES}
    found[RECIPES] = recipes_page(found[RECIPES], Recipe.model_validate({"name": "NAME"}))
    found[OBSERVABILITY] = _below_marker(found[OBSERVABILITY], OBSERVABILITY, metric_table())
    found[DASHBOARD] = dashboard_json()
    found[TROUBLESHOOTING] = troubleshooting_page(found[TROUBLESHOOTING], SYMPTOMS, HTTP_CODES)
    found[QUICKSTART] = quickstart_page(found[QUICKSTART], found[README])
    found[OPERATING] = operating_page(found[OPERATING])
    return found


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    for path, content in pages().items():
        if not path.exists() or path.read_text(encoding="utf-8") != content:
            path.write_text(content, encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
