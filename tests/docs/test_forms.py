"""The forms for issues, and how the project is cited."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FORMS = {path.stem: path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config"}
KINDS = {"markdown", "textarea", "input", "dropdown", "checkboxes"}


def problems(form: dict[str, Any]) -> list[str]:
    """What GitHub would refuse in an issue form: its own rules, of "Syntax for GitHub's form schema"."""
    found = [f"it has no {key}" for key in ("name", "description", "body") if not form.get(key)]
    asked = [each for each in form.get("body", []) if each.get("type") != "markdown"]
    found += [
        f"{each.get('type')} is no kind of field" for each in form.get("body", []) if each.get("type") not in KINDS
    ]
    found += [f"{each.get('id')} has no label" for each in asked if not each.get("attributes", {}).get("label")]
    names = [each.get("id") for each in asked]
    found += ["two fields have one id"] if len(set(names)) != len(names) else []
    return found + (["it asks for nothing"] if not asked else [])


@pytest.mark.parametrize("name", ["bug", "feature", "question"])
def test_a_form_is_one(name):
    assert problems(yaml.safe_load(FORMS[name].read_text())) == []


def test_a_bad_form_is_seen():
    form = yaml.safe_load(FORMS["bug"].read_text())
    assert problems({key: value for key, value in form.items() if key != "description"})
    assert problems(form | {"body": [{"type": "text", "id": "a", "attributes": {"label": "A"}}]})
    assert problems(form | {"body": [{"type": "input", "id": "a", "attributes": {}}]})
    assert problems(form | {"body": form["body"] + form["body"]})


def test_a_bug_is_reported_with_what_one_needs_to_see_it_again():
    text = FORMS["bug"].read_text()
    for asked in ("--json", "amenable doctor", "amenable --version", "recipe.yaml", "lineage.json", "SECURITY.md"):
        assert asked in text


def test_the_citation_is_of_this_version_and_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["cff-version"] == "1.2.0"
    assert (citation["title"], citation["version"], citation["license"]) == (
        project["name"],
        project["version"],
        project["license"],
    )
    assert "Ouyang" in str(citation["references"])
