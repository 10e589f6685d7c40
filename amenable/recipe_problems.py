"""Turns what pydantic says about a recipe into one sentence: the file, the key, what was given, what would be right."""

import difflib
import json
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

Key = tuple[str, ...]
_WORDS = re.compile(r"[A-Za-z_][A-Za-z_0-9]*(?:\.[A-Za-z_0-9]+)*")


@dataclass(frozen=True)
class Layer:
    """What one source says: `source` is a file's path or the command line, `values` is what it sets."""

    source: str
    values: dict[str, Any]

    def states(self, key: Key) -> bool:
        """True where this source sets `key` itself or something inside it."""
        at: Any = self.values
        for part in key:
            if isinstance(at, list):  # a list is said as a whole, with all its items
                return True
            if not isinstance(at, dict) or part not in at:
                return False
            at = at[part]
        return True


@dataclass(frozen=True)
class _Problem:
    """One pydantic error at the dotted key that a person wrote. `branches` are the union members it was tried as."""

    key: Key
    details: ErrorDetails
    siblings: tuple[str, ...]
    branches: tuple[tuple[Key, str], ...]


def sentence(error: ValidationError, model: type[BaseModel], layers: list[Layer]) -> str:
    """What is wrong with the recipe that `layers` (the most basic first) add up to, for the person who wrote it.

    The first problem is told in full, the others by their key.
    """
    problems = _of_the_likeliest_branch([_located(details, model) for details in error.errors()])
    by_key: dict[Key, list[_Problem]] = {}
    for problem in problems:
        by_key.setdefault(problem.key, []).append(problem)
    # A default that could not be computed is only the shadow of the problem in what it is computed from.
    shown = [
        (key, group)
        for key, group in by_key.items()
        if not all(problem.details["type"] == "default_factory_not_called" for problem in group)
    ]
    key, group = next(((key, group) for key, group in shown if group[0].details["type"] == "extra_forbidden"), shown[0])
    told = _told(key, group, model)
    text = f"{_source(key, told, layers)}: {told}"
    others = [".".join(other) or "the whole" for other, _ in shown if other != key]
    if others:
        text += f" Also wrong: {', '.join(others)}."
    return text


def _source(key: Key, told: str, layers: list[Layer]) -> str:
    """The layer whose word counted for `key`; for a key that nobody gave, the recipe file itself.

    A complaint about a whole group (`told`) names the keys inside it that do not fit together: the last layer that
    says one of them made the misfit.
    """
    mentioned = [(*key, *word.split(".")) for word in _WORDS.findall(told)]
    for wanted in (mentioned, [key] if key else []):
        for layer in reversed(layers):
            if any(layer.states(one) for one in wanted):
                return layer.source
    files = [layer for layer in layers if layer.source.endswith((".yaml", ".yml"))]
    return (files or layers)[-1].source


def _told(key: Key, group: list[_Problem], model: type[BaseModel]) -> str:
    dotted = ".".join(key)
    details = group[0].details
    context: dict[str, Any] = details.get("ctx", {})
    match details["type"]:
        case "extra_forbidden":
            return _unknown_key(key, group[0].siblings, model)
        case "missing":
            return f"the key {dotted!r} is required, but it is not given."
        case "value_error" | "assertion_error":
            reason = str(context.get("error", details["msg"])).rstrip(".")
            return f"{dotted}: {reason}." if dotted else f"{reason}."
        case "union_tag_not_found":
            tag = str(context.get("discriminator", "kind")).strip("'")
            return f"the key {f'{dotted}.{tag}'!r} is required, but it is not given."
        case "union_tag_invalid":
            tag = str(context["discriminator"]).strip("'")
            return _wrong_value(f"{dotted}.{tag}", f"one of {context['expected_tags']}", context["tag"])
    expectations = list(dict.fromkeys(filter(None, (_expected(problem.details) for problem in group))))
    if not expectations:
        message = details["msg"]
        return f"{dotted}: {message[:1].lower()}{message[1:].rstrip('.')}, but {_given(details['input'])} was given."
    return _wrong_value(dotted, " or ".join(expectations), details["input"])


def _wrong_value(dotted: str, expected: str, given: Any) -> str:
    text = f"{dotted} must be {expected}, but {_given(given)} was given"
    if expected.startswith("one of ") and isinstance(given, str):
        choices = [choice.strip("' ") for choice in expected.removeprefix("one of ").split(",")]
        near = difflib.get_close_matches(given, choices, n=1)
        if near:
            return f"{text}; did you mean {near[0]!r}?"
    if expected == "text" and given is not None and not isinstance(given, dict | list):
        return f"{text}; quote it twice on the command line, as in {dotted}='\"{_plain(given)}\"', or once in a file."
    return f"{text}."


def _unknown_key(key: Key, siblings: tuple[str, ...], model: type[BaseModel]) -> str:
    dotted = ".".join(key)
    group = ".".join(key[:-1])
    near = difflib.get_close_matches(key[-1], siblings, n=1)
    if near:
        return f"there is no key {dotted!r}; did you mean {'.'.join((*key[:-1], near[0]))!r}?"
    elsewhere: dict[str, str] = {}
    for path, _ in _all_fields(model):
        elsewhere.setdefault(path[-1], ".".join(path))
    near = difflib.get_close_matches(key[-1], elsewhere, n=1, cutoff=0.8)
    meant = elsewhere[near[0]] if near else _by_its_words(key, model)
    if meant:
        return f"there is no key {dotted!r}; did you mean {meant!r}?"
    where = f"in {group!r}" if group else "at the top"
    return f"there is no key {dotted!r}; the keys {where} are: {', '.join(siblings)}."


def _by_its_words(key: Key, model: type[BaseModel]) -> str | None:
    """The first key in the same group, or deeper in it, that has the words of the unknown one in its name or, where
    none has, in its description: `ppo.learning_rate` is ppo.policy.peak_lr. None where there is none."""
    words = re.compile(rf"\b{re.escape(key[-1].replace('_', ' '))}\b", re.IGNORECASE)
    inside = [(path, field) for path, field in _all_fields(model) if path[: len(key) - 1] == key[:-1]]
    named = [path for path, _ in inside if words.search(path[-1].replace("_", " "))]
    described = [path for path, field in inside if words.search(field.description or "")]
    return next((".".join(path) for path in [*named, *described]), None)


def _expected(details: ErrorDetails) -> str | None:
    """What a value should have been, as the end of "must be …"; None where pydantic's own words must do."""
    context: dict[str, Any] = details.get("ctx", {})
    match details["type"]:
        case "int_type" | "int_parsing" | "int_from_float" | "int_parsing_size":
            return "a whole number"
        case "float_type" | "float_parsing":
            return "a number"
        case "finite_number":
            return "a finite number"
        case "bool_type" | "bool_parsing":
            return "true or false"
        case "string_type" | "string_sub_type":
            return "text"
        case "path_type":
            return "a path (text)"
        case "list_type" | "tuple_type" | "set_type" | "frozen_set_type":
            return "a list"
        case "dict_type" | "model_type" | "model_attributes_type" | "mapping_type" | "dataclass_type":
            return "a group of keys"
        case "literal_error" | "enum":
            choices = str(context["expected"]).replace(" or ", ", ")
            return f"one of {choices}" if "," in choices else choices
        case "greater_than":
            return f"more than {context['gt']}"
        case "greater_than_equal":
            return f"at least {context['ge']}"
        case "less_than":
            return f"less than {context['lt']}"
        case "less_than_equal":
            return f"at most {context['le']}"
        case "multiple_of":
            return f"a multiple of {context['multiple_of']}"
        case "none_required":
            return "nothing (null)"
        case "too_short":
            return f"a list of at least {context['min_length']} items"
        case "too_long":
            return f"a list of at most {context['max_length']} items"
        case _:
            return None


def _given(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    if isinstance(value, dict):
        return "a group of keys"
    if isinstance(value, list):
        return f"the list {_plain(value)}"
    if isinstance(value, str):
        return f"the text {_plain(value)!r}"
    return _plain(value)


def _plain(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _located(details: ErrorDetails, model: type[BaseModel]) -> _Problem:
    """Walks the model along pydantic's location, which mixes keys, list positions and names of union members."""
    current: Any = model
    key: list[str] = []
    siblings: tuple[str, ...] = ()
    branches: list[tuple[Key, str]] = []
    for part in details["loc"]:
        current = _without_wrapping(current)
        if _is_union(current):
            branches.append((tuple(key), str(part)))
            current = next((member for member in get_args(current) if _answers_to(member, str(part))), None)
            continue
        key.append(str(part))
        if _is_model(current):
            siblings = tuple(current.model_fields)
            current = current.model_fields[str(part)].annotation if part in current.model_fields else None
        else:
            inside = [argument for argument in get_args(current) if argument is not Ellipsis]
            current = inside[-1] if inside else None
    return _Problem(tuple(key), details, siblings, tuple(branches))


def _is_model(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and not get_args(annotation) and issubclass(annotation, BaseModel)


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _without_wrapping(annotation: Any) -> Any:
    """The annotation without Annotated[…] and without "or None", neither of which shows in pydantic's locations."""
    if get_origin(annotation) is Annotated:
        return _without_wrapping(get_args(annotation)[0])
    if _is_union(annotation):
        members = [member for member in get_args(annotation) if member is not type(None)]
        if len(members) == 1:
            return _without_wrapping(members[0])
    return annotation


def _answers_to(member: Any, label: str) -> bool:
    """True where pydantic would call this union member `label`: its class name, or the value of a Literal field."""
    member = _without_wrapping(member)
    if not _is_model(member):
        return False
    literals = (field.annotation for field in member.model_fields.values() if get_origin(field.annotation) is Literal)
    return member.__name__ == label or any(label in map(str, get_args(literal)) for literal in literals)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The pydantic models that an annotation mentions, through Optional, Annotated, unions, lists and mappings."""
    if _is_model(annotation):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def only_model_in(annotation: Any) -> type[BaseModel] | None:
    """The one model that a field of this annotation may hold; None where it may hold several or none."""
    found = list(_models_in(annotation))
    return found[0] if len(found) == 1 else None


def _all_fields(model: type[BaseModel], above: Key = ()) -> Iterator[tuple[Key, FieldInfo]]:
    for name, field in model.model_fields.items():
        yield (*above, name), field
        for inner in _models_in(field.annotation):
            if inner is not model:
                yield from _all_fields(inner, (*above, name))


def _of_the_likeliest_branch(problems: list[_Problem]) -> list[_Problem]:
    """Without the complaints of union members that the person cannot have meant.

    Of the members that accept a group, the one with the fewest complaints is taken as meant; a key that it does not
    know speaks against it more than a wrong value. Members of another sort altogether count only among themselves.
    """
    for place in dict.fromkeys(place for problem in problems for place, _ in problem.branches):
        against: dict[str, int] = {}
        for problem in problems:
            for at, label in problem.branches:
                if at == place and len(problem.key) > len(place):
                    weight = 3 if problem.details["type"] == "extra_forbidden" else 1
                    against[label] = against.get(label, 0) + weight
        if against:
            meant = min(against, key=lambda label: against[label])
            problems = [
                problem for problem in problems if all(label == meant for at, label in problem.branches if at == place)
            ]
    return problems
