"""The page in a browser: logging in, asking, and what is told when something is in the way."""

import re

import pytest
from playwright.sync_api import expect

from serving.page.backend import SESSION_COOKIE
from tests.serving.page_stand_in import (
    OPERATOR,
    PLAIN,
    SCORES,
    expected_kl,
    logprob,
    text_of,
)
from tests.serving.page_visits import (
    NEEDS_CHROMIUM,
    PROMPT,
    Server,
    ask,
    column,
    finished,
    log_in,
    ready,
    wait_for,
    words,
)

pytest_plugins = ["tests.serving.page_fixtures"]
pytestmark = [pytest.mark.slow, pytest.mark.service, NEEDS_CHROMIUM]


# the login ------------------------------------------------------------------------------------------------------


def test_a_wrong_token_is_told_and_the_right_one_leaves_nothing_for_scripts(visit, server: Server):
    page = visit(token=None)
    expect(page.locator("#login")).to_be_visible()
    assert page.locator("#run-name").inner_text() == "Spot checks"
    page.locator("#token").fill("guess")
    page.keyboard.press("Enter")
    expect(page.locator("#login-problem")).to_have_text("This token is not known here, or it has been revoked.")
    log_in(page, OPERATOR)
    expect(page.locator("#login")).to_be_hidden()
    assert page.locator("#run-name").inner_text() == "made-up"
    expect(page.locator("#synthetic")).to_be_visible()
    (cookie,) = page.context.cookies()
    assert (cookie["name"], cookie["httpOnly"], cookie["sameSite"]) == (SESSION_COOKIE, True, "Strict")
    held = page.evaluate(
        "() => document.cookie + JSON.stringify([localStorage, sessionStorage, document.body.innerHTML])"
    )
    assert OPERATOR not in held
    assert cookie["value"] not in held


def test_a_reload_stays_logged_in_and_logging_out_ends_it(visit, server: Server):
    page = visit()
    page.reload()
    ready(page)
    expect(page.locator("#login")).to_be_hidden()
    page.locator("#log-out").click()
    expect(page.locator("#login")).to_be_visible()
    assert server.service.sessions == {}
    assert page.context.cookies() == []


def test_who_does_not_log_in_is_told_what_to_do(visit):
    page = visit(token=None)
    expect(page.locator("#token")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#notice")).to_have_text("Log in with a token to ask the models of this run.")
    expect(page.locator("#log-out")).to_have_text("Log in")


def test_a_session_that_has_ended_asks_for_the_token_and_the_question_goes_on(visit, server: Server):
    page = visit()
    server.service.sessions.clear()
    ask(page)
    expect(page.locator("#login")).to_be_visible()
    page.locator("#token").fill(OPERATOR)
    page.keyboard.press("Enter")
    finished(page, "policy")
    assert words(column(page, "policy")) == text_of(PLAIN["policy"])


# answers --------------------------------------------------------------------------------------------------------


def test_answers_stream_side_by_side_and_are_measured(visit, server: Server):
    server.service.pause_s = 0.2
    page = visit()
    ask(page)
    columns = page.locator(".answer")
    expect(columns).to_have_count(3)
    for model in ("base", "sft", "policy"):  # a beginning of every answer, before any has ended
        expect(column(page, model).locator(".token").nth(1)).to_be_visible()
    early = [len(words(column(page, model))) for model in ("base", "sft", "policy")]
    assert column(page, "policy").get_attribute("data-state") == "streaming"
    expect(page.locator("#stop")).to_be_visible()
    finished(page, "base", "sft", "policy")
    for model, then in zip(("base", "sft", "policy"), early, strict=True):
        assert words(column(page, model)) == text_of(PLAIN[model])
        assert 0 < then < len(text_of(PLAIN[model]))
        expect(column(page, model).locator(".score b")).to_have_text(f"{SCORES[model]:.2f}".replace("-", "−"))
        kl = f"{expected_kl(model, PLAIN[model]):.2f}".replace("-", "−")
        expect(column(page, model).locator(".kl b")).to_have_text(kl)
    expect(page.locator(".has-best")).to_have_count(1)
    expect(column(page, "policy").locator(".has-best")).to_have_count(1)
    expect(column(page, "policy").locator(".versions")).to_have_text("versions 0.47 → 0.48")
    expect(page.locator("#announcer")).to_contain_text("policy has answered: score 1.27")


def test_the_models_are_given_the_same_tokens_and_the_sampling_that_was_set(visit, server: Server):
    page = visit()
    for field_id, value in {"temperature": "0.7", "top-p": "0.9", "max-tokens": "5", "seed": "11"}.items():
        page.locator(f"#{field_id}").fill(value)
    ask(page)
    finished(page, "base", "sft", "policy")
    streamed = [body for body in server.service.asked if body.get("stream")]
    assert {body["model"] for body in streamed} == {"base", "sft", "policy"}
    for body in streamed:
        assert [body[key] for key in ("temperature", "top_p", "max_tokens", "seed")] == [0.7, 0.9, 5, 11]
        assert body["prompt"] == streamed[0]["prompt"]
        assert len(body["prompt"]) == len(f"question : {PROMPT} answer :")
    echoed = [body for body in server.service.asked if body.get("echo")]
    assert [body["model"] for body in echoed] == ["reference"] * 3
    assert {len(body["prompt"]) for body in echoed} == {len(streamed[0]["prompt"]) + 5}
    expect(column(page, "policy").locator(".state")).to_have_text("Cut off at max tokens. ")


@pytest.mark.parametrize(
    ("field_id", "value", "sentence"),
    [
        ("temperature", "-1", "The temperature should be a number from 0 to 10."),
        ("top-p", "0", "Top-p should be a number above 0 and at most 1."),
        ("max-tokens", "513", "Max tokens should be a whole number from 1 to 512."),
        ("max-tokens", "", "Max tokens should be a whole number from 1 to 512."),
        ("seed", "1.5", "The seed should be a whole number, 0 or above, or empty."),
        ("prompt", "  ", "Type a prompt, or pick one."),
    ],
)
def test_a_form_that_cannot_be_asked_says_which_field(visit, server: Server, field_id: str, value: str, sentence: str):
    page = visit()
    page.locator("#prompt").fill(PROMPT)
    page.locator(f"#{field_id}").fill(value)
    page.locator("#run").click()
    expect(page.locator("#ask-problem")).to_have_text(sentence)
    expect(page.locator(f"#{field_id}")).to_be_focused()
    assert server.service.asked == []


def test_tokens_are_shaded_by_their_log_ratio_and_tell_it_by_pointer_and_by_key(visit):
    page = visit()
    ask(page)
    finished(page, "sft", "policy")
    shown = column(page, "policy").locator(".token")
    expect(shown).to_have_count(len(PLAIN["policy"]) - 1 + 1)  # two are one character, and the end is one
    for index, token in enumerate(PLAIN["policy"][:13]):
        value = logprob("policy", token) - logprob("reference", token)
        steps = sum(abs(value) >= edge for edge in (0.1, 0.5, 1, 2))
        classes = (shown.nth(index).get_attribute("class") or "").split()
        wanted = [] if steps == 0 else [f"{'more' if value > 0 else 'less'}-{steps}"]
        assert [one for one in classes if one.startswith(("more", "less"))] == wanted, token
    token = PLAIN["policy"][2]
    value = logprob("policy", token) - logprob("reference", token)
    shown.nth(2).hover()
    said = f"“{token}”: {value:+.2f} nats".replace("-", "−")
    expect(column(page, "policy").locator(".detail")).to_contain_text(said)
    page.locator("#run").focus()
    page.keyboard.press("3")  # the third column: base, sft, policy
    third = page.locator(".answer").nth(2)
    expect(third.locator(".tokens")).to_be_focused()
    page.keyboard.press("End")
    expect(third.locator(".detail")).to_contain_text("the end:")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    expect(third.locator(".token").nth(1)).to_have_class(re.compile(r"\bcurrent\b"))
    third.locator("summary").click()
    expect(third.locator("tbody tr")).to_have_count(third.locator(".token").count())


def test_a_model_that_is_being_loaded_is_waited_for_and_said_so(visit, server: Server):
    server.service.loading = {"sft": 2, "reference": 1}
    page = visit()
    ask(page)
    expect(column(page, "sft").locator(".state")).to_contain_text("sft is being loaded; trying again in 1 s.")
    finished(page, "base", "sft", "policy")
    assert words(column(page, "sft")) == text_of(PLAIN["sft"])
    assert [body["model"] for body in server.service.asked if body.get("stream")].count("sft") == 3
    expect(column(page, "sft").locator(".kl b")).to_have_text(
        f"{expected_kl('sft', PLAIN['sft']):.2f}".replace("-", "−")
    )


def test_a_stream_that_breaks_keeps_its_beginning_and_its_reason(visit, server: Server):
    server.service.broken = {"sft"}
    page = visit()
    ask(page)
    finished(page, "base", "policy")
    expect(column(page, "sft")).to_have_attribute("data-state", "failed")
    expect(column(page, "sft").locator(".state")).to_have_text("The engine has died. ")
    assert words(column(page, "sft")) == text_of(PLAIN["sft"][:3])


def test_escape_stops_the_answers_and_the_service_is_freed(visit, server: Server):
    server.service.pause_s = 0.5
    page = visit()
    ask(page)
    expect(column(page, "policy").locator(".token").nth(0)).to_be_visible()
    page.keyboard.press("Escape")
    expect(column(page, "policy")).to_have_attribute("data-state", "stopped")
    expect(page.locator("#run")).to_have_text("Ask")
    wait_for(lambda: server.service.cut_off == 3, "the service to notice that three streams were left")
    assert 0 < len(words(column(page, "policy"))) < len(text_of(PLAIN["policy"]))


def test_a_service_that_cannot_be_reached_is_told(visit):
    page = visit()
    page.context.set_offline(True)
    ask(page)
    expect(page.locator("#ask-problem")).to_have_text("The service cannot be reached; it may be starting or down.")
    page.context.set_offline(False)
    ask(page)
    finished(page, "policy")


def test_a_checkpoint_is_a_column_of_its_own(visit):
    page = visit()
    page.locator("#version").select_option("policy@40")
    page.locator("#add").click()
    ask(page)
    finished(page, "base", "sft", "policy", "policy@40")
    assert words(column(page, "policy@40")) == text_of(PLAIN["policy@40"])


def test_a_held_out_prompt_can_be_picked(visit, server: Server):
    page = visit()
    page.locator("#held-out").select_option(index=2)
    expect(page.locator("#prompt")).to_have_value("name 3 animals without lions .")
    page.locator("#another").click()
    assert page.locator("#prompt").input_value() in page.evaluate(
        "async () => (await (await fetch('/page/prompts')).json()).prompts.map((one) => one.prompt)"
    )
