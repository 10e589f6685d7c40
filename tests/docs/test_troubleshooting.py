"""docs/troubleshooting.md lists every code as the program has it."""

from amenable.error_codes import HTTP_CODES, SYMPTOMS, Code, Symptom


def test_the_page_is_current(make):
    assert make.pages()[make.TROUBLESHOOTING] == make.TROUBLESHOOTING.read_text(), "run `python docs/make.py`"


def test_every_code_has_one_row_under_its_symptom(make):
    page = make.TROUBLESHOOTING.read_text()
    for symptom in SYMPTOMS:
        section = page.partition(f"\n## {symptom.seen}\n")[2].partition("\n## ")[0]
        assert section.count("\n| `") == len(symptom.codes)
    codes = [one.code for symptom in SYMPTOMS for one in symptom.codes] + [one.code for one in HTTP_CODES]
    assert [code for code in codes if page.count(f"\n| `{code}` |") != 1] == []


def test_a_new_code_makes_the_page_stale(make):
    page = make.TROUBLESHOOTING.read_text()
    new = Symptom("The moon", (Code("moon/full", "It is full.", "Wait."),))
    assert make.troubleshooting_page(page, SYMPTOMS, HTTP_CODES) == page
    assert "| `moon/full` | It is full. | Wait. |" in make.troubleshooting_page(page, [*SYMPTOMS, new], HTTP_CODES)
