"""What docs/make.py writes into pages beside the recipe's fields: copies of README.md, and the supported versions."""

import pytest

from cluster.supported import STACK


def test_the_pages_are_current(make):
    pages = make.pages()
    for page in (make.QUICKSTART, make.OPERATING):
        assert page.read_text() == pages[page], f"{page.name}: run `python docs/make.py`"


def test_what_the_readme_measured_stands_in_the_quickstart(make):
    text = make.QUICKSTART.read_text()
    assert "Report: runs/demo/report.html" in text
    assert "| `make demo`, after that |" in text


def test_a_changed_readme_makes_the_quickstart_stale(make):
    readme = make.README.read_text()
    page = make.quickstart_page(make.QUICKSTART.read_text(), readme)
    assert make.quickstart_page(page, readme) == page
    assert make.quickstart_page(page, readme.replace("| `make demo`, after that |", "| `make demo`, then |")) != page
    with pytest.raises(KeyError):
        make.quickstart_page(page, readme.replace("<!-- times -->", ""))


def test_the_table_of_versions_has_all_that_every_node_must_have(make):
    rows = make.supported_versions().splitlines()
    assert [name for name in STACK if not any(row.startswith(f"| `{name}` | ") for row in rows)] == []
    assert rows[2].startswith("| Python | ")


def test_another_version_makes_the_page_stale(make):
    page = make.OPERATING.read_text()
    stale = page.replace("| `ray` | ==2", "| `ray` | ==1")
    assert stale != page
    assert make.operating_page(stale) == page
