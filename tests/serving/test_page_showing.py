"""The page in a browser: hostile text, kept comparisons, the run, keys, phones and darkness."""

import re
import time
from pathlib import Path

import pytest
from playwright.sync_api import expect

from serving.page.run_view import PageRun
from tests.serving.page_stand_in import (
    HOSTILE,
    OPERATOR,
    READER,
)
from tests.serving.page_visits import (
    NEEDS_CHROMIUM,
    PROMPT,
    WATCH,
    Server,
    ask,
    column,
    finished,
    ready,
    wait_for,
    words,
)

pytest_plugins = ["tests.serving.page_fixtures"]
pytestmark = [pytest.mark.slow, pytest.mark.service, NEEDS_CHROMIUM]


# hostile text ---------------------------------------------------------------------------------------------------


def test_what_models_and_people_write_is_text_wherever_it_is_shown(visit, server: Server):
    server.service.hostile = True
    evil = "policy@<img src=x onerror=window.canary=1>"
    server.service.names = (*server.service.names, evil)
    page = visit()
    ask(page, "<img src=x onerror=window.canary=1> \u202e\x07 <script>window.canary=1</script>")
    finished(page, "base", "sft", "policy")
    text = words(column(page, "policy"))
    assert "<script>window.canary=1</script>" in text
    assert "\\u202eevil\\u202c" in text
    assert "\\u001b[31m" in text
    assert len([token for token in HOSTILE if token in text]) >= 9
    assert "\\u202e\\u0007" in page.locator("#asked").inner_text()
    column(page, "policy").locator("summary").click()
    page.locator("#keep").click()
    expect(page.locator("#history li")).not_to_have_count(0)
    made = page.locator("main img, main script, main iframe, #columns a, #columns svg, #kept img, [onerror], [onload]")
    expect(made).to_have_count(0)
    expect(page.locator("#served-rows")).to_contain_text(evil)
    again = visit(page.evaluate("() => '/' + location.hash"))
    expect(column(again, "policy").locator(".token").nth(3)).to_be_visible()
    assert words(column(again, "policy")) == text
    time.sleep(0.3)  # for an image that should not be there to fail to load


def test_the_watch_of_these_tests_sees_what_the_policy_stops(browser, server: Server):
    context = browser.new_context()
    context.add_init_script(WATCH)
    page = context.new_page()
    page.goto(server.url)
    page.evaluate("() => { document.body.innerHTML = '<img src=x onerror=\"window.canary=1\">'; }")
    wait_for(lambda: page.evaluate("() => window.violations.length") > 0, "the policy to stop a handler")
    assert page.evaluate("() => window.canary") is None
    bare = browser.new_context(bypass_csp=True).new_page()
    bare.goto(server.url)
    bare.evaluate("() => { document.body.innerHTML = '<img src=x onerror=\"window.canary=1\">'; }")
    wait_for(lambda: bare.evaluate("() => window.canary") == 1, "the same to run without the policy")
    context.close()
    bare.context.close()


# what was kept --------------------------------------------------------------------------------------------------


def test_a_link_opens_the_same_comparison_for_somebody_else_and_holds_no_text(visit, server: Server, run: PageRun):
    page = visit()
    page.locator("#seed").fill("3")
    ask(page)
    finished(page, "base", "sft", "policy")
    assert not list(run.directory.glob("serving/comparisons/*")) or PROMPT not in "".join(
        path.read_text() for path in run.directory.glob("serving/comparisons/*")
    )
    page.locator("#keep").click()
    expect(page.locator("#link-text")).to_have_value(re.compile(r"^http://[^?]+/#comparison=[0-9a-f]{24}$"))
    link = page.locator("#link-text").input_value()
    assert page.url == link
    expect(page.locator("#history li").first).to_contain_text(PROMPT)
    other = visit(link.removeprefix(server.url), READER)
    expect(other.locator("#kept-note")).to_contain_text("Kept by ann")
    expect(other.locator("#kept-note")).to_contain_text("temperature 1, top-p 1, at most 256 tokens, seed 3")
    assert other.locator("#asked").inner_text() == PROMPT
    for model in ("base", "sft", "policy"):
        assert words(column(other, model)) == words(column(page, model))
        for what in (".score b", ".kl b", ".versions"):
            assert column(other, model).locator(what).inner_text() == column(page, model).locator(what).inner_text()
        assert shades(column(other, model)) == shades(column(page, model))
    other.locator("#reuse").click()
    expect(other.locator("#prompt")).to_have_value(PROMPT)
    expect(other.locator("#seed")).to_have_value("3")


def shades(answer) -> list[set[str]]:
    """The classes of the tokens of an answer, without the mark of the one under the pointer."""
    classes = [one.get_attribute("class") or "" for one in answer.locator(".token").all()]
    return [set(one.split()) - {"current"} for one in classes]


def test_a_link_to_nothing_is_told(visit):
    page = visit(f"/#comparison={'0' * 24}")
    expect(page.locator("#notice")).to_have_text("There is no comparison with this id; it may have been removed.")


def test_the_visit_is_remembered_in_the_page_alone(visit, server: Server):
    page = visit()
    ask(page, "first thing")
    finished(page, "policy")
    expect(page.locator("#run")).to_be_enabled()
    ask(page, "second thing")
    expect(page.locator("#asked")).to_have_text("second thing")
    finished(page, "policy")
    expect(page.locator("#visit li")).to_have_count(2)
    page.locator("#visit button", has_text="first thing").click()
    expect(page.locator("#asked")).to_have_text("first thing")
    page.reload()
    ready(page)
    expect(page.locator("#visit li")).to_have_count(0)


# the run --------------------------------------------------------------------------------------------------------


def test_the_curves_so_far_are_drawn(visit):
    page = visit()
    panels = page.locator("#curves .panel")
    expect(panels).to_have_count(12)
    expect(page.locator("#curves h3").first).to_have_text("round-01/ppo (under way)")
    assert page.locator("#curves path.curve").count() >= 12
    expect(page.locator("#curves .panel:visible")).to_have_count(3)
    page.locator("#curves-more summary").click()
    expect(page.locator("#curves .panel:visible")).to_have_count(12)
    first = panels.first
    expect(first).to_contain_text("Reward model's score")
    path = first.locator("path.curve").first.get_attribute("d") or ""
    assert path.count("L") == 47


def test_the_policy_is_held_and_let_go_and_a_conflict_is_told(visit, server: Server):
    page = visit()
    page.locator("#hold-version").select_option("policy@20")
    page.locator("#hold button[type=submit]").click()
    expect(page.locator("#wish")).to_contain_text("policy is held at policy@20 by ann")
    assert (server.service.wish.pinned, server.service.wish.who) == ("policy@20", "ann")
    server.service.rival = "cleo"
    page.locator("#follow").click()
    expect(page.locator("#hold-problem")).to_have_text("cleo has changed this since you looked; look again.")
    expect(page.locator("#wish")).to_contain_text("by cleo")
    page.locator("#follow").click()
    expect(page.locator("#wish")).to_contain_text("policy follows the newest weights of the run")
    reader = visit(token=READER)
    expect(reader.locator("#served-rows tr")).to_have_count(6)
    expect(reader.locator("#hold")).to_be_hidden()


# keys, phones, darkness -----------------------------------------------------------------------------------------


def test_all_of_it_goes_by_keyboard(visit, server: Server):
    page = visit(token=None)
    expect(page.locator("#token")).to_be_focused()
    page.keyboard.type(OPERATOR)
    page.keyboard.press("Enter")
    ready(page)
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.type("typed / with ? and p k h 1")  # keys that act elsewhere are text here
    expect(page.locator("#prompt")).to_have_value("typed / with ? and p k h 1")
    page.keyboard.press("Control+Enter")
    finished(page, "base", "sft", "policy")
    page.keyboard.press("Tab")
    expect(page.locator("#held-out")).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("1")
    expect(page.locator(".answer").first.locator(".tokens")).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".answer").first.locator(".detail")).to_contain_text("nats")
    page.keyboard.press("k")
    expect(page.locator("#link")).to_be_visible()
    page.locator("#open-keys").focus()
    page.keyboard.press("h")
    expect(page.locator("#visit button").first).to_be_focused()
    page.keyboard.press("?")
    expect(page.locator("#keys")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#keys")).to_be_hidden()
    page.keyboard.press("/")
    expect(page.locator("#prompt")).to_be_focused()


def test_keys_without_ctrl_can_be_turned_off(visit):
    page = visit()
    page.locator("#open-keys").focus()
    page.keyboard.press("?")
    page.locator("#single-keys").uncheck()
    page.locator("#close-keys").click()
    page.keyboard.press("/")
    expect(page.locator("#prompt")).not_to_be_focused()
    page.reload()
    ready(page)
    expect(page.locator("#single-keys")).not_to_be_checked()


def test_every_stop_of_the_tab_key_is_seen_and_has_a_name(visit):
    page = visit()
    ask(page)
    finished(page, "base", "sft", "policy")
    page.locator(".skip").focus()
    stops = []
    for _ in range(80):
        page.keyboard.press("Tab")
        stop = page.evaluate(
            """() => {
              const at = document.activeElement;
              if (at === document.body) return null;
              const style = getComputedStyle(at);
              const name = at.getAttribute("aria-label") ?? at.labels?.[0]?.textContent ?? at.textContent
                ?? document.getElementById(at.getAttribute("aria-labelledby"))?.textContent;
              return [at.id || at.tagName, name.trim().length > 0, style.outlineStyle !== "none"];
            }"""
        )
        if stop is None:
            break
        stops.append(stop)
    assert len(stops) > 25
    assert [stop for stop in stops if not (stop[1] and stop[2])] == []
    order = [name for name, _, _ in stops if name in ("prompt", "run", "keep", "hold-version")]
    assert order == ["prompt", "run", "keep", "hold-version"]


PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True, "device_scale_factor": 2}


def test_a_phone_scrolls_in_one_direction_and_reads_one_answer_below_the_other(visit, server: Server):
    server.service.hostile = True
    page = visit(**PHONE)
    assert width(page) <= 390
    page.locator("#version").select_option("policy@40")
    page.locator("#add").tap()
    ask(page, "word" * 200)
    finished(page, "base", "sft", "policy", "policy@40")
    column(page, "policy").locator("summary").tap()
    page.locator("#keep").tap()
    expect(page.locator("#link")).to_be_visible()
    assert width(page) <= 390
    assert page.evaluate(BEYOND) == []
    boxes = [one.bounding_box() for one in page.locator(".answer").all()]
    assert all(box["x"] == boxes[0]["x"] for box in boxes)
    assert [box["y"] for box in boxes] == sorted({box["y"] for box in boxes})
    assert float(page.locator("#prompt").evaluate("(one) => parseFloat(getComputedStyle(one).fontSize)")) >= 16
    column(page, "sft").locator(".token").nth(2).tap()
    expect(column(page, "sft").locator(".detail")).to_contain_text("nats")


BEYOND = """() => [...document.querySelectorAll("body *")]
  .filter((one) => one.checkVisibility() && !one.closest(".visually-hidden, .skip, .scroll > *"))
  .filter((one) => one.getBoundingClientRect().right > 390.5)
  .map((one) => one.outerHTML.slice(0, 80))"""
"""What is cut off at the right, though nothing scrolls: all but what has a scroll bar of its own."""


def width(page) -> int:
    return page.evaluate("() => document.documentElement.scrollWidth")


CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const over = (colours) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (rgb) => rgb.map((v) => v / 255)
    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const worst = [];
  for (const one of document.body.querySelectorAll("*")) {
    const own = [...one.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
    if (!own || !one.checkVisibility() || one.disabled || one.closest("svg, option, noscript, .skip")) continue;
    const behind = [];
    for (let at = one; at !== null; at = at.parentElement) behind.unshift(getComputedStyle(at).backgroundColor);
    const back = over(behind);
    const [a, b] = [light(back), light(over([...behind, getComputedStyle(one).color]))].sort((x, y) => y - x);
    worst.push([(a + 0.05) / (b + 0.05), one.className + " " + one.textContent.trim().slice(0, 30)]);
  }
  return worst.sort((x, y) => x[0] - y[0]).slice(0, 3);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_in_the_dark(visit, scheme: str):
    page = visit(color_scheme=scheme)
    ask(page)
    finished(page, "base", "sft", "policy")
    paper = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(250, 249, 247)", "dark": "rgb(22, 22, 21)"}[scheme]
    worst = page.evaluate(CONTRAST)
    assert worst[0][0] >= 4.5, worst
    page.evaluate(
        "() => { document.querySelector('#ask label').style.color = getComputedStyle(document.body).backgroundColor; }"
    )
    assert page.evaluate(CONTRAST)[0][0] < 4.5


def test_the_page_is_there_for_people_without_a_token_where_the_service_is_open(visit, server: Server):
    server.service.open = True
    page = visit(token=None)
    ready(page)
    expect(page.locator("#login")).to_be_hidden()
    expect(page.locator("#log-out")).to_be_hidden()
    ask(page)
    finished(page, "policy")


def test_the_pictures_of_the_documentation_are_there():
    for name in ("page-desktop.png", "page-phone.png"):
        assert (Path("docs/images") / name).read_bytes().startswith(b"\x89PNG")
