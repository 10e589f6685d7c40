"""Reads a recipe: YAML that may extend another YAML, then key=value overrides, then a pydantic model that checks all.

Four layers, later ones win: the model's defaults, the extended file, the file itself, the command line. Groups are
merged key by key; lists and plain values are replaced. A group whose `kind` changes is replaced as a whole, because the
keys of another kind would not fit it.
"""

import difflib
import hashlib
import json
import os
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from amenable.recipe_problems import Layer, only_model_in, sentence
from corpus.problems import UsageProblem

Settings = TypeVar("Settings", bound=BaseModel)

COMMAND_LINE = "Command line"
_EXTENDS = "extends"
_KIND = "kind"
# PyYAML reads YAML 1.1, where 1e-3 is text because it has no dot; YAML 1.2, and every person, reads a number.
_FLOAT_WITHOUT_DOT = re.compile(r"^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$")


class _RecipeLoader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number, refuses a key given twice, which YAML would silently drop, and raises
    nothing but YAMLError: PyYAML lets through what Python says of the 45th day of a month."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
            kind = node.tag.rpartition(":")[2]
            raise yaml.MarkedYAMLError(
                problem=f"{str(node.value)[:80]!r} cannot be read as {kind}", problem_mark=node.start_mark
            ) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} is not text", problem_mark=key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} is given twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _RecipeDumper(yaml.SafeDumper):
    """Writes what `_RecipeLoader` reads back unchanged: text that looks like 1e-3 gets its quotes."""


for _class in (_RecipeLoader, _RecipeDumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT_WITHOUT_DOT, list("-+0123456789"))


@dataclass(frozen=True)
class PackagedRecipe:
    """A recipe that comes with the program: its name, its file and the first sentence of the comment on top."""

    name: str
    path: Path
    says: str


def packaged_recipes() -> list[PackagedRecipe]:
    """The recipes that come with the program, by name."""
    directory = Path(str(resources.files("recipes")))
    return [PackagedRecipe(path.stem, path, _first_comment(path)) for path in sorted(directory.glob("*.yaml"))]


def _first_comment(path: Path) -> str:
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").strip())
    return " ".join(lines).strip().split(". ")[0].rstrip(".")


def find_recipe(name: str | os.PathLike[str]) -> Path:
    """The file meant by `name`: a path, or else the name of a packaged recipe. Raises UsageProblem where neither is."""
    path = _expanded(name)
    if _is_file(path):
        return path
    packaged = {recipe.name: recipe.path for recipe in packaged_recipes()}
    if str(name) in packaged:
        return packaged[str(name)]
    if path.is_dir():  # its parent can be looked into: `_is_file` has done so
        raise UsageProblem(f"{path} is a directory, not a recipe; name a YAML file in it.", "recipe/not-found")
    near = difflib.get_close_matches(path.stem, packaged, n=1)
    known = ", ".join(packaged) or "none"
    hint = f"did you mean the packaged recipe {near[0]!r}?" if near else f"the packaged recipes are: {known}."
    raise UsageProblem(f"There is no recipe file {str(name)!r}; {hint}", "recipe/not-found")


def _expanded(name: str | os.PathLike[str]) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError as error:  # ~somebody who is not known here
        raise UsageProblem(f"{name}: the path cannot be understood ({error}).", "recipe/not-found") from None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:  # a directory that may not be looked into, a name that is too long
        raise UsageProblem(f"{path}: the recipe cannot be reached ({error.strerror}).", "recipe/not-found") from None


def recipe_files(name: str | os.PathLike[str]) -> list[Path]:
    """The files that make up the recipe `name`: its own last, those that it extends before it; none where `name` is
    that of a packaged recipe, which every machine with the program has. Raises UsageProblem as `load_recipe` does."""
    path = find_recipe(name)
    return [Path(layer.source) for layer in _file_layers(path)] if _is_file(_expanded(name)) else []


def load_recipe(path: str | os.PathLike[str], overrides: list[str], model: type[Settings]) -> Settings:
    """The recipe in the file `path` (or the packaged recipe of that name) with `overrides` applied, checked by `model`.

    An override is `key.sub=value`, its value typed as in YAML: `ppo.policy.peak_lr=1e-5`, `model.base=null`.
    Raises UsageProblem, one sentence that names the file and the dotted key, for everything that is wrong in them.
    """
    layers = _file_layers(find_recipe(path))
    if overrides:
        layers.append(Layer(COMMAND_LINE, _override_layer(overrides)))
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = _merged(merged, layer.values)
    merged = _over_defaults(merged, model)
    try:
        return model.model_validate(merged)
    except ValidationError as error:
        raise UsageProblem(sentence(error, model, layers), "recipe/setting") from None


def resolved(recipe: BaseModel) -> str:
    """The recipe as YAML with every default stated; reading it back gives an equal recipe."""
    values = recipe.model_dump(mode="json")
    return yaml.dump(values, Dumper=_RecipeDumper, sort_keys=False, allow_unicode=True, width=120)


def recipe_hash(recipe: BaseModel) -> str:
    """SHA-256 (hex) of all the recipe says, defaults included; the order in which keys were written does not matter."""
    text = json.dumps(recipe.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _file_layers(path: Path) -> list[Layer]:
    """The files that make up a recipe, the most basic first."""
    layers: list[Layer] = []
    seen: list[Path] = []
    current = path
    while True:
        if current.resolve() in seen:
            chain = " → ".join(layer.source for layer in reversed(layers))
            raise UsageProblem(
                f"{path}: the recipes extend each other in a circle: {chain} → {current}.", "recipe/extends"
            )
        seen.append(current.resolve())
        values = _read_yaml(current)
        parent = values.pop(_EXTENDS, None)
        layers.insert(0, Layer(str(current), values))
        if parent is None:
            return layers
        if not isinstance(parent, str):
            raise UsageProblem(
                f"{current}: '{_EXTENDS}' must name one YAML file, but {parent!r} was given.", "recipe/extends"
            )
        following = current.parent / _expanded(parent)
        if not _is_file(following):
            raise UsageProblem(f"{current}: it extends {parent!r}, but there is no file {following}.", "recipe/extends")
        current = following


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = _parsed(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageProblem(f"{path}: the recipe cannot be read ({error.strerror}).", "recipe/unreadable") from None
    except UnicodeDecodeError:
        raise UsageProblem(f"{path}: the recipe is not UTF-8 text.", "recipe/unreadable") from None
    except yaml.YAMLError as error:
        raise UsageProblem(
            f"{path}{_place(error)}: this is not a valid recipe ({_yaml_reason(error)}).", "recipe/unreadable"
        ) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageProblem(
            f"{path}: a recipe is a group of 'key: value' lines, but this file holds something else.",
            "recipe/unreadable",
        )
    return values


def _parsed(text: str) -> Any:
    """What the YAML `text` says. Raises yaml.YAMLError."""
    try:
        return yaml.load(text, Loader=_RecipeLoader)
    except RecursionError:
        raise yaml.YAMLError("its brackets or groups are nested too deeply") from None


def _place(error: yaml.YAMLError) -> str:
    mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
    return f", line {mark.line + 1}" if mark else ""


def _yaml_reason(error: yaml.YAMLError) -> str:
    reason = error.problem if isinstance(error, yaml.MarkedYAMLError) else None
    return reason or " ".join(str(error).split())


def _override_layer(overrides: list[str]) -> dict[str, Any]:
    """The overrides as one nested mapping; of two values for one key the later wins."""
    layer: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.split(".")
        if not equals or not all(part and part == part.strip() for part in parts):
            raise UsageProblem(
                f"{COMMAND_LINE}: {override!r} is not an override; write key=value with dots between the parts "
                "of the key, as in seed=7 or ppo.batch_size=128.",
                "recipe/override",
            )
        try:
            value = _parsed(text)
        except yaml.YAMLError as error:
            shown = override if len(override) <= 80 else f"{override[:77]}…"
            raise UsageProblem(
                f"{COMMAND_LINE}: the value in {shown!r} cannot be read ({_yaml_reason(error)}); "
                "quote it if it is meant as text.",
                "recipe/override",
            ) from None
        for part in reversed(parts):
            value = {part: value}
        layer = _merged(layer, value)
    return layer


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`below` with `above` laid over it; neither is changed."""
    if _KIND in above and _KIND in below and above[_KIND] != below[_KIND]:
        return dict(above)
    result = dict(below)
    for key, value in above.items():
        under = result.get(key)
        result[key] = _merged(under, value) if isinstance(value, dict) and isinstance(under, dict) else value
    return result


def _over_defaults(values: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """`values` laid over the defaults of the groups that they give in part.

    pydantic replaces a default group as a whole: of `ppo_init: {batch_size: 8}` it would keep nothing that the recipe's
    own default says of ppo_init. A group that does not say its `kind` is of the default's.
    """
    result = dict(values)
    for name, field in model.model_fields.items():
        group = result.get(name)
        if not isinstance(group, dict):
            continue
        only_model = only_model_in(field.annotation)
        default = field.get_default(call_default_factory=not field.default_factory_takes_validated_data)
        if isinstance(default, BaseModel) and (only_model or field.discriminator == _KIND):
            group = _merged(default.model_dump(), group)
        result[name] = _over_defaults(group, only_model) if only_model else group
    return result
