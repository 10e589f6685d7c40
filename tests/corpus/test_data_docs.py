"""docs/data.md: its examples are read as it says."""

import re
from pathlib import Path

import yaml

from corpus.files import FileCorpusSettings
from corpus.formats import COLUMNS, detect_format, read_source
from corpus.readers import read_rows

DOC = (Path(__file__).parents[2] / "docs" / "data.md").read_text()


def test_every_format_has_an_example_that_is_detected_and_read(tmp_path):
    found = {}
    for number, example in enumerate(re.findall(r"```json\n(.*?)```", DOC, re.DOTALL)):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(example)
        format = detect_format(next(read_rows(path)))
        rows = read_source(str(path))
        found[format] = (len(rows.prompts), len(rows.demonstrations), len(rows.comparisons), len(rows.documents))
    assert found == {
        "pairs": (1, 1, 1, 1),
        "rankings": (1, 1, 1, 1),
        "prompt_response": (1, 1, 0, 1),
        "messages": (1, 1, 0, 1),
        "prompt": (1, 0, 0, 0),
        "text": (0, 0, 0, 1),
    }
    assert set(found) == set(COLUMNS)


def test_the_recipes_shown_are_valid():
    shown = [yaml.safe_load(text)["corpus"] for text in re.findall(r"```yaml\n(.*?)```", DOC, re.DOTALL)]
    parts = [FileCorpusSettings.model_validate(settings) for settings in shown]
    assert parts[1].prompts is not None
    assert parts[1].prompts.format == "prompt"
