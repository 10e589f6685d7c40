"""Tokens and sessions: who gets in, who does not, and that nothing kept on the disk opens the door."""

import json
import stat
import time

import pytest

from corpus.file_lock import file_lock
from corpus.problems import UsageProblem
from serving import access as access_module
from serving.access import TOKENS_VARIABLE, Access, csrf_holds, new_token, read_tokens, revoke_token
from serving.page.backend import CSRF_HEADER, SESSION_COOKIE


@pytest.fixture
def file(tmp_path):
    return tmp_path / "tokens.json"


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def cookie(value: str) -> dict[str, str]:
    return {"cookie": f"other=1; {SESSION_COOKIE}={value}"}


def test_a_token_opens_with_its_scopes_and_only_its_hash_is_kept(tmp_path, file):
    token = new_token(file, "ada", frozenset({"read"}))
    assert token.split("_", 2)[2] not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    visitor = Access(tmp_path, file).visitor(bearer(token))
    assert visitor is not None
    assert (visitor.name, visitor.scopes, visitor.csrf) == ("ada", {"read"}, None)


@pytest.mark.parametrize("wrong", ["", "x", "amn_000000000000_" + "a" * 43, "Basic abc", "amn_\u0101_x"])
def test_what_is_no_token_opens_nothing(tmp_path, file, wrong):
    new_token(file, "ada", frozenset({"read"}))
    access = Access(tmp_path, file)
    assert access.visitor(bearer(wrong)) is None
    assert access.visitor({"authorization": wrong}) is None
    assert access.visitor({}) is None
    assert access.log_in(wrong) is None


def test_a_token_with_one_other_letter_opens_nothing(tmp_path, file):
    token = new_token(file, "ada", frozenset({"read"}))
    other = token[:-1] + ("A" if token[-1] != "A" else "B")
    assert Access(tmp_path, file).visitor(bearer(other)) is None


def test_a_hash_is_no_token(tmp_path, file):
    new_token(file, "ada", frozenset({"read"}))
    [kept] = read_tokens(file).values()
    assert Access(tmp_path, file).visitor(bearer(kept.sha256)) is None


def test_a_revoked_token_is_refused_at_once_and_its_sessions_end(tmp_path, file):
    token = new_token(file, "ada", frozenset({"read"}))
    new_token(file, "bob", frozenset({"read"}))
    access = Access(tmp_path, file)
    session = access.log_in(token)
    assert session is not None
    assert access.visitor(cookie(session.cookie)) is not None
    revoke_token(file, token.split("_")[1])
    assert access.visitor(bearer(token)) is None
    assert access.visitor(cookie(session.cookie)) is None
    with pytest.raises(UsageProblem, match="has no token"):
        revoke_token(file, token.split("_")[1])


def test_a_token_file_that_is_gone_or_damaged_lets_nobody_in(tmp_path, file):
    token = new_token(file, "ada", frozenset({"read"}))
    access = Access(tmp_path, file)
    file.write_text("{")
    assert access.visitor(bearer(token)) is None
    file.unlink()
    assert access.visitor(bearer(token)) is None
    assert not access.open


def test_a_session_carries_a_csrf_token_of_its_own(tmp_path, file):
    token = new_token(file, "ada", frozenset({"read", "operate"}))
    access = Access(tmp_path, file)
    first, second = access.log_in(token), access.log_in(token)
    assert first is not None
    assert second is not None
    visitor = access.visitor(cookie(first.cookie))
    assert visitor is not None
    assert csrf_holds(visitor, {CSRF_HEADER: first.visitor.csrf or ""})
    assert not csrf_holds(visitor, {})
    assert not csrf_holds(visitor, {CSRF_HEADER: second.visitor.csrf or ""})
    assert csrf_holds(access.visitor(bearer(token)), {})  # pyright: ignore[reportArgumentType]


def test_a_session_ends_by_logging_out_in_every_replica_and_by_time(tmp_path, file, monkeypatch):
    token = new_token(file, "ada", frozenset({"read"}))
    one, other = Access(tmp_path, file), Access(tmp_path, file)
    session, later = one.log_in(token), one.log_in(token)
    assert session is not None
    assert later is not None
    assert other.visitor(cookie(session.cookie)) is not None
    one.log_out(session.cookie)
    assert other.visitor(cookie(session.cookie)) is None
    assert other.visitor(cookie(later.cookie)) is not None
    now = time.time()
    monkeypatch.setattr(access_module.time, "time", lambda: now + access_module.SESSION_S + 1)
    assert other.visitor(cookie(later.cookie)) is None


def test_a_forged_session_is_refused(tmp_path, file):
    token = new_token(file, "ada", frozenset({"read"}))
    access = Access(tmp_path, file)
    session = access.log_in(token)
    assert session is not None
    name, until, nonce, signature = session.cookie.split(".")
    for forged in (
        f"{name}.{int(until) + 1}.{nonce}.{signature}",
        f"{name}.{until}.{nonce}.{'0' * 64}",
        f"{name}.{until}.{'0' * 32}.{signature}",
        "",
        session.cookie + ".",
    ):
        assert access.visitor(cookie(forged)) is None
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert Access(elsewhere, file).visitor(cookie(session.cookie)) is None  # another run's secret


def test_without_tokens_the_service_is_open_and_with_an_empty_file_it_is_not(tmp_path, file, monkeypatch):
    monkeypatch.delenv(TOKENS_VARIABLE, raising=False)
    visitor = Access(tmp_path, None).visitor({})
    assert visitor is not None
    assert not visitor.login
    file.write_text(json.dumps({"schema_version": 1, "tokens": []}))
    assert Access(tmp_path, file).visitor({}) is None


def test_tokens_may_come_from_the_environment(tmp_path, file, monkeypatch):
    token = new_token(file, "ada", frozenset({"score"}))
    monkeypatch.setenv(TOKENS_VARIABLE, file.read_text())
    access = Access(tmp_path, None)
    assert not access.open
    visitor = access.visitor(bearer(token))
    assert visitor is not None
    assert visitor.scopes == {"score"}
    monkeypatch.setenv(TOKENS_VARIABLE, "nonsense")
    with pytest.raises(UsageProblem, match="AMENABLE_TOKENS is no token file"):
        Access(tmp_path, None)


def test_a_token_file_that_another_process_holds_is_told_of_in_time(file, monkeypatch):
    monkeypatch.setattr(access_module, "LOCK_S", 0.2)
    new_token(file, "ada", frozenset({"read"}))
    [before] = read_tokens(file)
    with file_lock(file.with_name(f".{file.name}.lock"), 1.0):
        for change in (lambda: new_token(file, "bob", frozenset({"read"})), lambda: revoke_token(file, before)):
            with pytest.raises(UsageProblem, match=r"was locked for 0\.2 s by process \d+") as found:
                change()
            assert found.value.code == "storage/locked"
    assert list(read_tokens(file)) == [before]
    revoke_token(file, before)
    assert read_tokens(file) == {}
