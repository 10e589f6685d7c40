"""KubeRay's schemas as jsonschema takes them, by the steps of ../shared/data/README.md."""

import copy
import json
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "data" / "kuberay-crds"
FILES = {"RayJob": "rayjobs", "RayService": "rayservices", "RayCluster": "rayclusters"}


def violations(document: dict[str, Any]) -> list[str]:
    """What the schema of its kind finds wrong with a manifest: path and message of each."""
    [path] = FOLDER.glob(f"{FILES[document['kind']]}.v1.json")
    schema = _strict(json.loads(path.read_text())["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    given = _with_defaults(_pruned(copy.deepcopy(document)), schema)
    return [
        f"{'.'.join(str(part) for part in error.absolute_path)}: {error.message[:200]}"
        for error in Draft202012Validator(schema).iter_errors(given)
    ]


def _strict(schema: Any) -> Any:
    """Unknown properties are refused wherever some are listed, and integers or strings taken where CRDs say so."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _strict(value) for key, value in schema.items()}
    if made.get("x-kubernetes-int-or-string"):
        made.pop("anyOf", None)
        made.pop("pattern", None)
        made["type"] = ["integer", "string"]
    is_listed = isinstance(made.get("properties"), dict) and made.get("type") == "object"
    if is_listed and not made.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _pruned(inner) for key, inner in value.items() if inner is not None}
    return [_pruned(each) for each in value] if isinstance(value, list) else value


def _with_defaults(value: Any, schema: dict[str, Any]) -> Any:
    if isinstance(value, dict):
        for key, inner in schema.get("properties", {}).items():
            if key not in value and "default" in inner:
                value[key] = copy.deepcopy(inner["default"])
            if key in value:
                value[key] = _with_defaults(value[key], inner)
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        return [_with_defaults(each, schema["items"]) for each in value]
    return value
