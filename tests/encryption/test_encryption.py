"""Keys, envelopes and what opens them, without any backend."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from agents.extensions.memory import EncryptedSession as SDKEncryptedSession
from agents.memory import SQLiteSession
from hypothesis import given
from hypothesis import strategies as st

from agent_sessions import EncryptedSession, EncryptSession
from agent_sessions.encryption import (
    KeyRing,
    MasterKey,
    Memory,
    Vault,
    drive,
    reading,
    session_context,
)
from agent_sessions.encryption.envelopes import seal
from agent_sessions.encryption.keys import GENERATE, session_key
from agent_sessions.encryption.reading import PopGuard
from agent_sessions.exceptions import (
    EncryptionError,
    InvalidEncryptionKey,
    InvalidItem,
    UnacceptedEnvelope,
    UnknownEncryptionKey,
)

NEW = "tWbR7cyRZ9TxOiGGW8Dl2gG5XHJ1vVFqUPWmNOYlqEc="
OLD = "9mGJxqP0sRKbrtF2cQmVd0uYJ5zB8LwXn3aTfEoHkMY="
SECRET_TEXT = "the treasure lies under the oak"


def said(text: str) -> Any:
    return {"role": "user", "content": text}


def vault_of(
    *keys: str,
    owner: str | None = "7",
    session_id: str = "s",
    name: str = "private",
    **options: Any,
) -> Vault:
    ring = KeyRing.parse(keys or [NEW])
    return Vault(ring, session_context(name, owner, session_id), session_id, **options)


# -- keys ------------------------------------------------------------------------------


def test_a_key_id_is_drawn_from_the_key_and_holds_nothing_of_it() -> None:
    key, other = MasterKey.parse(NEW), MasterKey.parse(OLD)
    assert key.id == MasterKey.parse(NEW.encode()).id != other.id
    assert len(key.id) == 16
    assert key.id not in NEW.lower()
    assert key.is_strong


def test_nothing_shows_a_key() -> None:
    key = MasterKey.parse(NEW)
    ring = KeyRing.parse([NEW, OLD])
    vault = vault_of(NEW, memory=Memory(1_000_000))
    shown = f"{key!r} {ring!r} {vault!r} {vault._memory!r}"
    for secret in (NEW, OLD, repr(key.secret), key.secret.hex()):
        assert secret not in shown
    assert ring.ids == [key.id, MasterKey.parse(OLD).id]


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("", "empty"),
        ("xyz12", "too short: 5 characters"),
        (f"{NEW}\n", "something more"),
        (NEW[:-5] + "=", "cut or changed"),
        (None, "NoneType"),
        (7, "int"),
        (b"\xff" * 32, "no text"),
    ],
    ids=["empty", "short", "newline", "cut", "none", "int", "raw"],
)
def test_a_bad_key_is_refused_and_not_quoted(key: Any, reason: str) -> None:
    with pytest.raises(InvalidEncryptionKey, match=reason) as caught:
        KeyRing.parse([NEW, key])
    assert str(caught.value).startswith("Key 2: ")
    assert not isinstance(key, str) or not key or key not in str(caught.value)


HEX = "9c1185a5c5e9fc54612808977ee8f548b2258d31a7d3f0c96b2e4d5f60718293"
ALMOST = {
    "lost_equals": (NEW[:-1], "cut or changed"),
    "lost_equals_standard": (f"+/{NEW[2:-1]}", "cut or changed"),
    "two_equals": (f"{NEW}=", "and something more"),
    "cut_by_two": (NEW[:-2], "cut or changed"),
    "cut_by_four": (NEW[:40], "cut or changed"),
    "cut_in_front": (NEW[1:], "cut or changed"),
    "cut_inside": (NEW[:20] + NEW[21:], "cut or changed"),
    "cut_inside_and_end": (NEW[:20] + NEW[21:-1], "cut or changed"),
    "typed_twice": (NEW[:20] + NEW[19:-1], "cut or changed"),
    "two_keys": (f"{NEW},{OLD}", "and something more"),
    "joined_keys": (f"{NEW}{OLD}", "and something more"),
    "quoted": (f"'{NEW}'", "and something more"),
    "double_quoted": (f'"{NEW}"', "and something more"),
    "half_quoted": (f"'{NEW}", "and something more"),
    "typographic": (f"\u201c{NEW}\u201d", "and something more"),
    "repr": (repr(NEW.encode()), "and something more"),
    "line_end": (f"{NEW}\r\n", "and something more"),
    "written_line_end": (f"{NEW}\\n", "and something more"),
    "wrapped": (f"{NEW[:30]}\n{NEW[30:]}", "cut or changed"),
    "byte_order_mark": (f"\ufeff{NEW}", "and something more"),
    "named": (f"AGENT_KEY={NEW}", "and something more"),
    "exported": (f"export AGENT_KEY='{NEW}'", "and something more"),
    "yaml": (f"key: {NEW}", "and something more"),
    "named_and_cut": (f"AGENT_KEY={NEW[:-1]}", "cut or changed"),
    "in_a_list": (f"['{NEW}']", "and something more"),
    "quoted_in_a_url": (f"{NEW[:-1]}%3D", "cut or changed"),
    "replaced": (f"{NEW[:9]}*{NEW[10:]}", "cut or changed"),
    "hex_cut": (HEX[:-1], "64 digits"),
    "hex_quoted": (f"'{HEX}'", "64 digits"),
    "hex_prefixed": (f"0x{HEX}", "64 digits"),
    "16_bytes": ("6hbL2Q0uCwQ2gkUu7gkq1Q==", "cut or changed"),
    "24_bytes": ("Yc3m0Hq0xX5p8n2lW1zv7TgUeRkA9bQd", "cut or changed"),
    "31_bytes": (f"{NEW[:40]}qQ==", "cut or changed"),
}


@pytest.mark.parametrize(("key", "reason"), ALMOST.values(), ids=list(ALMOST))
def test_what_is_nearly_a_key_is_an_error_that_says_what_is_wrong(
    key: str, reason: str
) -> None:
    for each in (key, key.encode()):
        with pytest.raises(InvalidEncryptionKey, match=reason) as caught:
            MasterKey.parse(each)
        for start in range(len(key) - 8):
            assert key[start : start + 9] not in str(caught.value)


@given(st.binary(min_size=32, max_size=32))
def test_both_spellings_of_a_key_are_the_same_one(secret: bytes) -> None:
    standard = base64.b64encode(secret).decode()
    spelled = base64.urlsafe_b64encode(secret).decode()
    one, other = MasterKey.parse(standard), MasterKey.parse(spelled)
    assert one.secret == other.secret == secret
    assert one.is_strong == other.is_strong == (len(set(secret)) >= 8)
    with pytest.raises(InvalidEncryptionKey, match="equals sign"):
        MasterKey.parse(spelled[:-1])


@given(st.text(st.characters(), max_size=120))
def test_any_text_is_a_key_or_refused_without_being_quoted(text: str) -> None:
    told = ""
    try:
        assert len(MasterKey.parse(text).secret) >= 16
    except InvalidEncryptionKey as exc:
        told = f"{exc!r} {exc.__context__!r}"
    assert len(text) < 12 or text not in told


async def test_the_sdk_takes_the_same_bytes_of_either_spelling() -> None:
    for key in (f"+/{NEW[2:]}", HEX):
        assert MasterKey.parse(key).is_strong
        store = await made()
        await SDKEncryptedSession("s", store, key).add_items([said("theirs")])
        session = EncryptedSession(store, key, accept_sdk_envelopes=True)
        assert await session.get_items() == [said("theirs")]


@pytest.mark.parametrize(
    "phrase",
    [
        "correct horse battery staple",
        "correct-horse-battery-staple-and-so-on",
        "MyVeryLongPassphrase2024ForAgentsInProduction",
        "Tr0ub4dor3AndMoreWordsInARow",
        "it's a very long pass phrase, isn't it: yes",
        "PASSWORD=correct horse battery staple",
        "550e8400-e29b-41d4-a716-446655440000",
        "p1)$8wq&d0=k@7v!x2z_3m(9c#5n^6b*4j-h+g%fsaltyu1e2r",
    ],
)
def test_pass_phrases_are_still_taken_as_they_are(phrase: str) -> None:
    key = MasterKey.parse(phrase)
    assert (key.secret, key.is_strong) == (phrase.encode(), False)


@pytest.mark.parametrize(
    "keys", [NEW, NEW.encode(), 7, None], ids=["str", "bytes", "int", "none"]
)
def test_keys_are_a_list(keys: Any) -> None:
    with pytest.raises(InvalidEncryptionKey, match="list"):
        KeyRing.parse(keys)


def test_a_ring_has_keys_and_none_twice() -> None:
    with pytest.raises(InvalidEncryptionKey, match="none"):
        KeyRing.parse([])
    with pytest.raises(InvalidEncryptionKey, match="twice"):
        KeyRing.parse([NEW, OLD, NEW])


@pytest.mark.parametrize(
    "key",
    ["a password of some length", "django-insecure-&x8", "A" * 43 + "="],
    ids=["password", "secret_key", "zeros"],
)
def test_what_can_be_guessed_is_known_as_weak(key: str) -> None:
    assert not MasterKey.parse(key).is_strong


# -- binding ---------------------------------------------------------------------------


def test_what_was_sealed_opens() -> None:
    vault = vault_of()
    envelope = vault.seal([said(SECRET_TEXT)])[0]
    assert SECRET_TEXT not in json.dumps(envelope)
    assert set(envelope) == {"__enc__", "v", "kid", "id", "payload"}
    opened = vault.open(envelope)
    assert opened is not None
    assert opened.item == said(SECRET_TEXT)


@pytest.mark.parametrize(
    "elsewhere",
    [
        {"session_id": "other"},
        {"owner": "8"},
        {"owner": None},
        {"name": "another alias"},
    ],
    ids=["session", "owner", "no_owner", "alias"],
)
def test_a_row_that_was_moved_does_not_open(elsewhere: Any) -> None:
    envelope = vault_of().seal([said("hi")])[0]
    assert vault_of(**elsewhere).open(envelope) is None


def test_names_that_run_together_are_not_confused() -> None:
    assert session_context("a", "1", "b") != session_context("a", None, '1","b')
    assert session_context("a", None, "b") != session_context("a", "null", "b")


def test_an_envelope_opens_under_its_own_id_only() -> None:
    vault = vault_of(memory=Memory(1_000_000))
    one, two = vault.seal([said("one"), said("two")])
    assert vault.open(one) is not None
    assert vault.open(one | {"payload": two["payload"]}) is None
    assert vault.open(one | {"id": two["id"]}) is None
    assert vault.open(one | {"id": None}) is None
    assert vault.open({k: v for k, v in one.items() if k != "id"}) is None


@pytest.mark.parametrize("place", [0, 5, 12, 30, 60, -2])
def test_a_changed_letter_closes_it(place: int) -> None:
    vault = vault_of(memory=Memory(1_000_000))
    envelope = vault.seal([said("hi")])[0]
    assert vault.open(envelope) is not None
    token = envelope["payload"]
    letters = list(token)
    letters[place] = "A" if letters[place] != "A" else "B"
    assert vault.open(envelope | {"payload": "".join(letters)}) is None


@pytest.mark.parametrize(
    "item",
    [
        said("never encrypted"),
        {"__enc__": 1},
        {"__enc__": 1, "v": 2, "kid": "x", "payload": 7},
        {"__enc__": 1, "v": "2", "kid": "x", "payload": ""},
        {},
        None,
        "text",
    ],
    ids=["plain", "bare", "payload", "version", "empty", "none", "text"],
)
def test_what_is_no_envelope_is_never_taken_for_an_item(item: Any) -> None:
    assert vault_of().open(item) is None


def test_an_envelope_of_the_future_is_an_error() -> None:
    envelope = vault_of().seal([said("hi")])[0] | {"v": 3}
    with pytest.raises(EncryptionError, match="version 3"):
        vault_of().open(envelope)


def test_a_missing_key_is_named() -> None:
    envelope = vault_of(OLD).seal([said(SECRET_TEXT)])[0]
    with pytest.raises(UnknownEncryptionKey) as caught:
        vault_of(NEW).open(envelope)
    assert caught.value.key_id == MasterKey.parse(OLD).id
    assert caught.value.key_id in str(caught.value)
    assert SECRET_TEXT not in str(caught.value)
    assert vault_of(NEW, OLD).open(envelope) is not None


def test_a_text_opens_in_its_own_place_only() -> None:
    vault = vault_of()
    text = vault.seal_text("secret")
    assert vault.open_text(text) == "secret"
    for bad in ("plain", '{"text": "plain"}', text.replace('"id": "', '"id": "0')):
        with pytest.raises(EncryptionError, match="doesn't open"):
            vault.open_text(bad)


def test_an_item_of_the_sdk_is_no_text_of_ours() -> None:
    """Its envelopes are bound to the session's id alone, and hold what people write."""
    store = SQLiteSession("s")
    theirs = SDKEncryptedSession("s", store, NEW)
    item: Any = {"role": "user", "content": "hi", "text": SECRET_TEXT}
    asyncio.run(theirs.add_items([item]))
    (envelope,) = asyncio.run(store.get_items())
    with pytest.raises(EncryptionError, match="doesn't open"):
        vault_of().open_text(json.dumps(envelope))


def test_what_is_no_json_is_refused_by_number() -> None:
    with pytest.raises(InvalidItem, match="Item 1 of 2"):
        vault_of().seal([said("hi"), {"score": float("nan")}])


# -- rotation --------------------------------------------------------------------------


def test_a_new_key_keeps_id_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    old = vault_of(OLD)
    monkeypatch.setattr("time.time", lambda: 1_000_000.0)
    envelope = old.seal([said("hi")])[0]
    monkeypatch.undo()
    new = vault_of(NEW, OLD).reseal(envelope)
    assert new is not None
    assert new["id"] == envelope["id"]
    assert new["kid"] == MasterKey.parse(NEW).id
    opened = vault_of(NEW).open(new)
    assert opened is not None
    assert (opened.item, opened.written) == (said("hi"), 1_000_000)
    assert vault_of(NEW, OLD).reseal(new) is None
    assert vault_of(NEW, OLD).reseal(said("plain")) is None


# -- reading ---------------------------------------------------------------------------


def read(vault: Vault, stored: list[Any], limit: int | None) -> tuple[Any, list[Any]]:
    """Read as a session does; give the items and the windows that were asked for."""
    asked = []

    def ask(request: tuple[str, Any]) -> list[Any]:
        _, window = request
        asked.append(window)
        return stored if window is None else stored[-window:]

    found = drive(reading(vault, limit), ask)
    return [item["content"] for item in found.items], asked


def test_a_limit_counts_what_opens() -> None:
    vault = vault_of()
    stored = vault.seal([said(str(n)) for n in range(8)])
    stored[5] = stored[5] | {"payload": stored[4]["payload"]}
    stored[6] = said("plain")
    # One more is asked for, to tell whether the first comes in its time.
    assert read(vault, stored, 1) == (["7"], [2])
    assert read(vault, stored, 2) == (["4", "7"], [3, 6])
    assert read(vault, stored, 2**31 - 1)[1] == [2**31 - 1]
    assert read(vault, stored, None)[0] == ["0", "1", "2", "3", "4", "7"]
    assert read(vault, stored, 100)[0] == ["0", "1", "2", "3", "4", "7"]


def test_a_history_of_which_nothing_opens_is_not_empty() -> None:
    stored = vault_of(session_id="elsewhere").seal([said("a"), said("b")])
    for limit in (None, 1, 2, 9):
        with pytest.raises(EncryptionError, match="None of the 2 items"):
            read(vault_of(), stored, limit)
    assert read(vault_of(), [], None)[0] == []


def turns(vault: Vault, monkeypatch: pytest.MonkeyPatch, *times: float) -> list[Any]:
    """Seal a question and an answer at each time; the answer comes 10 s later."""
    stored: list[Any] = []
    for number, moment in enumerate(times):
        monkeypatch.setattr("time.time", lambda moment=moment: moment)
        stored += vault.seal([said(f"q{number}")])
        monkeypatch.setattr("time.time", lambda moment=moment: moment + 10)
        stored += vault.seal([{"role": "assistant", "content": f"a{number}"}])
    return stored


def test_a_lifetime_hides_whole_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    vault = vault_of(lifetime=100)
    stored = turns(vault, monkeypatch, 1000, 1050, 1100)
    # 1105 is between the times of the second turn's two items.
    monkeypatch.setattr("time.time", lambda: 1155.0)
    assert read(vault, stored, None)[0] == ["q1", "a1", "q2", "a2"]
    assert read(vault, stored, 3)[0] == ["a1", "q2", "a2"]
    assert read(vault, stored, 9) == (["q1", "a1", "q2", "a2"], [10])
    monkeypatch.setattr("time.time", lambda: 1161.0)
    assert read(vault, stored, None)[0] == ["q2", "a2"]
    monkeypatch.setattr("time.time", lambda: 9999.0)
    assert read(vault, stored, None)[0] == []
    assert read(vault, stored, 2) == ([], [3])
    assert read(vault_of(), stored, None)[0][0] == "q0"
    guard = PopGuard(vault)
    assert guard.look(stored[-1:])
    assert not guard.may_take()


def is_known(memory: Memory, vault: Vault, envelope: Any) -> bool:
    return memory.find(vault.context, envelope, {envelope["kid"]}) is not None


def test_opened_text_is_remembered_within_bounds() -> None:
    memory = Memory(40_000)
    vault = vault_of(memory=memory)
    stored = vault.seal([said("x" * 1000 + str(n)) for n in range(100)])
    assert len(read(vault, stored, None)[0]) == 100
    kept = [e for e in stored if is_known(memory, vault, e)]
    assert 5 < len(kept) < 40_000 / 2_000
    other = vault_of(session_id="other", memory=memory)
    # What is too long for its share is not remembered.
    long, short = other.seal([said("z" * 20_000), said("short")])
    assert not is_known(memory, other, long)
    assert is_known(memory, other, short)
    memory.forget(vault.context)
    assert not [e for e in stored if is_known(memory, vault, e)]
    assert is_known(memory, other, short)
    memory.drop(other.context, short["id"])
    assert not is_known(memory, other, short)
    # Room is counted to the letter: what went makes room for as much.
    again = vault.seal([said("x" * 1000 + str(n)) for n in range(100)])
    assert len([e for e in again if is_known(memory, vault, e)]) == len(kept)
    nothing = Memory(0)
    vault_of(memory=nothing).seal([said("x")])
    assert repr(nothing) == "<Memory 0 sessions>"


def wait_until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        time.sleep(0.01)


def test_opened_text_is_forgotten_when_it_is_old() -> None:
    """Its row may be gone, in a process that knows nothing of this one."""
    memory = Memory(1_000_000, max_age=0.05)
    vault = vault_of(memory=memory)
    for _ in range(2):
        envelope = vault.seal([said("hi")])[0]
        assert is_known(memory, vault, envelope)
        wait_until(lambda: repr(memory) == "<Memory 0 sessions>")
        assert vault.open(envelope) is not None
        wait_until(lambda: repr(memory) == "<Memory 0 sessions>")


def test_a_memory_that_is_closed_holds_nothing_and_can_go_on() -> None:
    memory = Memory(1_000_000)
    vault = vault_of(memory=memory)
    before = threading.active_count()
    envelope = vault.seal([said("hi")])[0]
    assert threading.active_count() == before + 1
    memory.close()
    wait_until(lambda: threading.active_count() == before)
    assert not is_known(memory, vault, envelope)
    assert vault.open(envelope) is not None
    assert is_known(memory, vault, envelope)
    memory.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on Windows")
def test_a_fork_remembers_nothing() -> None:
    """It has no thread that would forget it."""
    code = (
        "import os; from tests.encryption.test_encryption import *\n"
        "memory = Memory(1_000_000, max_age=0.05); vault = vault_of(memory=memory)\n"
        "envelope = vault.seal([said('hi')])[0]\n"
        "assert is_known(memory, vault, envelope)\n"
        "memory._lock.acquire()\n"
        "if not (child := os.fork()):\n"
        "    assert repr(memory) == '<Memory 0 sessions>'\n"
        "    assert vault.open(envelope).item == said('hi')\n"
        "    assert is_known(memory, vault, envelope)\n"
        "    wait_until(lambda: repr(memory) == '<Memory 0 sessions>')\n"
        "    os._exit(7)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert (done.stdout.strip(), done.stderr) == ("7", "")


def test_an_old_copy_is_told_wherever_it_is_put() -> None:
    vault = vault_of()
    batch = [vault.seal([said(f"{n}")])[0] for n in range(40)]
    for limit in (1, 2, 3, 10, 20):
        for place in range(41 - limit, 41):
            stored = [*batch[:place], batch[3], *batch[place:]]
            assert read(vault, stored, limit)[0] == [
                f"{n}" for n in range(40 - limit, 40)
            ]


def test_a_copy_hides_nothing_by_its_age(monkeypatch: pytest.MonkeyPatch) -> None:
    vault = vault_of(lifetime=100)
    stored = turns(vault, monkeypatch, 1000, 1050, 1100)
    monkeypatch.setattr("time.time", lambda: 1155.0)
    stored.append(stored[0])
    for limit in (None, 3, 4):
        assert read(vault, stored, limit)[0][-3:] == ["a1", "q2", "a2"]


def test_writers_side_by_side_cost_no_further_look() -> None:
    vault = vault_of()
    stored = [vault.seal([said(f"{n}")])[0] for n in range(40)]
    early = (1).to_bytes(7, "big").hex()
    # As written an hour before the others.
    ring = vault.ring
    first = seal(
        session_key(ring.first, vault.context),
        ring.first.id,
        early + "0" * 10,
        b'{"role":"user","content":"first"}',
        1,
    )
    stored[30:32] = stored[31], stored[30]
    history = [*stored[:20], first, *stored[20:]]
    assert read(vault, [first, *stored], 20)[1] == [21, 42]
    assert read(vault, history[20:], 20)[1] == [21]


def test_a_remembered_envelope_is_compared_to_the_last_letter() -> None:
    vault = vault_of(memory=Memory(1_000_000))
    one = vault.seal([said("one")])[0]
    assert vault.open(one) is not None
    cut = one["payload"][:-6] + ("AAAAAA" if one["payload"][-6] != "A" else "BBBBBB")
    assert vault.open(one | {"payload": cut}) is None
    assert vault.open(one) is not None


def test_a_remembered_envelope_opens_in_its_session_under_its_key_only() -> None:
    memory = Memory(1_000_000)
    vault = vault_of(memory=memory)
    (stored,) = vault.seal([said("one")])
    assert vault_of(session_id="other", memory=memory).open(stored) is None
    with pytest.raises(UnknownEncryptionKey):
        vault_of(OLD, memory=memory).open(stored)
    for changed in ({"v": 2.0}, {"v": 1}, {"id": "0" * 24}, {"more": 1}):
        assert is_known(memory, vault, stored)
        with suppress(UnacceptedEnvelope):
            assert vault.open(stored | changed) is None


def test_a_pop_that_begins_anew_passes_over_the_copy_again() -> None:
    vault = vault_of()
    pay, thanks = vault.seal([said("pay"), said("thanks")])
    guard = PopGuard(vault)
    assert guard.look([pay, thanks, pay])
    for _ in range(3):
        accepts = guard.begin()
        assert not accepts(pay)
    assert accepts(thanks)


# -- around any session ------------------------------------------------------------------


async def made(of: type[SQLiteSession] = SQLiteSession) -> Any:
    return await asyncio.to_thread(of, "s")


async def test_both_names_mean_the_same() -> None:
    assert EncryptSession is EncryptedSession
    with pytest.raises(TypeError, match="either"):
        EncryptedSession(await made())
    with pytest.raises(TypeError, match="either"):
        EncryptedSession(await made(), NEW, keys=[OLD])
    with pytest.raises(InvalidEncryptionKey):
        EncryptedSession(await made(), "short")
    with pytest.raises(ValueError, match="list"):
        EncryptedSession(await made(), keys=NEW)


async def test_a_wrong_key_destroys_nothing() -> None:
    """openai-agents #5005: a wrong key read nothing, and a pop deleted the row."""
    store = await made()
    await EncryptedSession(store, OLD).add_items([said("one"), said("two")])
    wrong = EncryptedSession(store, NEW)
    for call in (
        wrong.get_items,
        lambda: wrong.get_items(limit=1),
        wrong.pop_item,
        wrong.clear_session,
        wrong.clear,
    ):
        with pytest.raises(UnknownEncryptionKey, match=MasterKey.parse(OLD).id):
            await call()
    assert len(await store.get_items()) == 2
    right = EncryptedSession(store, keys=[NEW, OLD])
    assert await right.get_items() == [said("one"), said("two")]
    assert await right.pop_item() == said("two")
    await right.clear()
    assert await store.get_items() == []


async def test_a_pop_leaves_what_does_not_open() -> None:
    store = await made()
    session = EncryptedSession(store, NEW)
    await session.add_items([said("one")])
    await store.add_items([said("plain")])
    assert await session.get_items() == [said("one")]
    with pytest.raises(EncryptionError, match="Nothing was removed"):
        await session.pop_item()
    assert len(await store.get_items()) == 2
    assert EncryptedSession(store, OLD).session_id == "s"


class Faster(SQLiteSession):
    """Another process appends, under its own key, before each pop."""

    other: Any = None

    async def pop_item(self) -> Any:
        if self.other is not None:
            other, self.other = self.other, None
            await other.add_items([said("theirs")])
        return await super().pop_item()


async def test_a_pop_that_takes_anothers_item_puts_it_back() -> None:
    store = await made(Faster)
    session = EncryptedSession(store, NEW)
    await session.add_items([said("mine")])
    store.other = EncryptedSession(store, OLD)
    with pytest.raises(UnknownEncryptionKey):
        await session.pop_item()
    both = EncryptedSession(store, keys=[NEW, OLD])
    assert await both.get_items() == [said("mine"), said("theirs")]


@pytest.mark.parametrize(
    "key", [OLD, "a password of some length"], ids=["key", "password"]
)
async def test_histories_of_the_sdk_are_read(key: str) -> None:
    store = await made()
    theirs = SDKEncryptedSession("s", store, key)
    await theirs.add_items([said("theirs"), said("Grüße")])
    with pytest.raises(UnacceptedEnvelope, match="accept_sdk_envelopes=True"):
        await EncryptedSession(store, keys=[NEW, key]).get_items()
    ours = EncryptedSession(store, keys=[NEW, key], accept_sdk_envelopes=True)
    assert await ours.get_items() == [said("theirs"), said("Grüße")]
    await ours.add_items([said("ours")])
    assert (await ours.get_items())[-1] == said("ours")
    assert await ours.pop_item() == said("ours")
    assert await ours.pop_item() == said("Grüße")
    with pytest.raises(UnknownEncryptionKey, match="hkdf-v1"):
        await EncryptedSession(store, NEW, accept_sdk_envelopes=True).get_items()
    assert len(await store.get_items()) == 1


async def test_sessions_and_keys_are_not_in_the_repr() -> None:
    session = EncryptedSession(await made(), NEW)
    assert repr(session) == "<EncryptedSession 's'>"


def test_no_settings_are_needed() -> None:
    code = (
        "import asyncio; from agents import SQLiteSession; "
        "from agent_sessions import EncryptedSession\n"
        f"session = EncryptedSession(SQLiteSession('s'), {NEW!r})\n"
        "async def main():\n"
        "    await session.add_items([{'role': 'user', 'content': 'hi'}])\n"
        "    print(await session.get_items())\n"
        "asyncio.run(main())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "DJANGO_SETTINGS_MODULE"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert "'content': 'hi'" in done.stdout


# -- the docs ----------------------------------------------------------------------------

DOCS = (Path(__file__).parents[2] / "docs" / "encryption.md").read_text("utf-8")


def test_the_options_in_the_docs_are_those_of_the_backend() -> None:
    from agent_sessions.backends.encrypted.keyed import DEFAULTS

    table = re.search(r"\| option \|.*\n\|[-|]+\n((?:\|.*\n)+)", DOCS)
    assert table
    documented = {
        cells[1].strip(" `"): cells[2].strip(" `")
        for cells in (line.split("|") for line in table[1].splitlines())
    }
    assert documented.keys() == {"backend", "keys", *DEFAULTS}
    for name, default in DEFAULTS.items():
        if name not in {"name", "cache_bytes"}:
            assert documented[name] == str(default)
    assert DEFAULTS["cache_bytes"] == 8 * 2**20


def test_the_docs_tell_how_a_key_is_made() -> None:
    (command,) = re.findall(r"```console\n(.*)\n```", DOCS)
    assert command == GENERATE
    _, _, code = shlex.split(command)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert MasterKey.parse(done.stdout.strip()).is_strong


async def test_the_lines_in_the_docs_work() -> None:
    blocks = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    settings: dict[str, Any] = {"os": os}
    os.environ["AGENT_KEY"] = NEW
    exec(blocks[0], settings)
    options = settings["AGENT_SESSIONS"]["private"]["OPTIONS"]
    assert options == {"backend": "default", "keys": [NEW]}
    del os.environ["AGENT_KEY"]
    namespace: dict[str, Any] = {"key": NEW}
    await asyncio.to_thread(exec, blocks[1], namespace)
    await namespace["session"].add_items([said("hi")])
    assert await namespace["session"].get_items() == [said("hi")]
    envelope = vault_of().seal([said("hi")])[0]
    (shown,) = re.findall(r"```json\n(.*)\n```", DOCS)
    assert list(json.loads(shown)) == list(envelope)
