import pytest

from evaluation.markup import Markup, element, escape, join


def test_text_is_escaped_and_markup_is_not():
    inner = element("b", "<i>&\"'")
    assert inner == "<b>&lt;i&gt;&amp;&quot;&#x27;</b>"
    assert element("p", inner, "<", 3) == "<p><b>&lt;i&gt;&amp;&quot;&#x27;</b>&lt;3</p>"


def test_text_inside_lists_is_escaped():
    assert element("p", ["<a>", ["<b>"]], None) == "<p>&lt;a&gt;&lt;b&gt;</p>"
    assert join(["<", Markup("<br>")]) == "&lt;<br>"


def test_attributes_are_escaped_and_named_as_html_names_them():
    written = element("a", class_='x" onclick="evil()', aria_label="l", hidden=True, title=None, draggable=False, x=1.5)
    assert written == '<a class="x&quot; onclick=&quot;evil()" aria-label="l" hidden x="1.5"></a>'


def test_void_elements_have_no_end():
    assert element("meta", charset="utf-8") == '<meta charset="utf-8">'


def test_text_added_to_markup_is_no_longer_trusted():
    assert element("p", element("b") + "<script>") == "<p>&lt;b&gt;&lt;/b&gt;&lt;script&gt;</p>"


def test_characters_that_turn_text_around_or_cannot_be_seen_are_shown():
    assert escape("a\u202eb\x00c\ud800") == "a\\u202eb\\u0000c\\ud800"
    assert escape("line\n\ttab") == "line\n\ttab"
    escape("👩\u200d🔬 über").encode()


def test_an_object_of_no_known_kind_is_refused():
    with pytest.raises(TypeError, match="object cannot be written"):
        element("p", object())
