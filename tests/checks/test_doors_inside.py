"""The doors of docs/doors.md that no visitor knocks at: channels, commands, files."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from channels.layers import get_channel_layer
from cryptography.fernet import Fernet
from django.core.cache import cache
from django.core.management import CommandError, call_command, get_commands

from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.leases import this_process
from agent_sessions.consumers import AgentConsumer
from agent_sessions.models import AgentRun, AgentSession, SessionItem
from agent_sessions.runs import Conversation
from agent_sessions.runs.log import NUDGE, ChannelRelay, group_of
from tests.checks.test_doors import tables
from tests.support.admin_pages import make, make_run
from tests.support.chat import Socket, make_user, text_of
from tests.support.gated import gated
from tests.websocket.test_consumer import speaker

pytestmark = pytest.mark.one_database


class Pair:
    """A session of ours and one of theirs, each with a word in all that it holds."""

    def __init__(self) -> None:
        cache.clear()
        self.us, self.them = make_user("us"), make_user("them")
        self.ours = self.make("ours", self.us)
        self.theirs = self.make("theirs", self.them)

    def make(self, name: str, user: Any, **more: Any) -> AgentSession:
        row = make(
            f"{name}-id",
            {"role": "user", "content": f"{name}-question"},
            {"role": "assistant", "content": f"{name}-answer"},
            user=user,
            title=f"{name}-title",
            metadata={"about": f"{name}-metadata"},
            **more,
        )
        make_run(row, run_id=f"{name}-run", usage={f"{name}-usage": 1})
        return row


def said(name: str, text: str) -> bool:
    """Return whether a text has contents of a session."""
    kinds = ("question", "answer", "title", "metadata", "usage")
    return any(f"{name}-{kind}" in text for kind in kinds)


# -- channel messages ------------------------------------------------------------------


def test_each_channel_message_is_in_the_table() -> None:
    handlers = {
        name for name in dir(AgentConsumer) if name.startswith("agent_sessions_")
    }
    assert handlers == {kind.replace(".", "_") for kind in (NUDGE,)}
    assert set(tables("Channel messages")) == {*handlers, "group"}


@pytest.mark.django_db(transaction=True)
async def test_groups_are_of_one_session_of_one_owner() -> None:
    pair = await sync_to_async(Pair)()
    ours = await Conversation.find("ours-id", user=pair.us)
    names = {
        group_of(Conversation(pk, ours.backend, SessionKey(session_id, user)))
        for pk in (ours.pk, ours.pk + 1)
        for session_id in ("ours-id", "ours", "")
        for user in (None, pair.us.pk, pair.them.pk, str(pair.us.pk) + "0")
    }
    assert len(names) == 2 * 3 * 4
    assert all(re.fullmatch(r"agent_sessions\.[0-9a-f]{40}", name) for name in names)


@pytest.mark.django_db(transaction=True)
async def test_a_nudge_tells_and_stops_nothing_by_itself() -> None:
    pair = await sync_to_async(Pair)()
    ours = await Conversation.find("ours-id", user=pair.us)
    layer: Any = get_channel_layer()
    agent, model = gated("one two three four")
    async with (
        Socket("ours-id", pair.us, agent) as tab,
        Socket("theirs-id", pair.them, speaker()) as other,
    ):
        await other.sync()
        await other.to_end()
        await tab.say("r-1", "Hi")
        await model.paused.wait()
        # A stop from another session, and what the layer may hand to the group.
        await other.send({"type": "abort", "runId": "r-1"})
        message = {"type": NUDGE, "run_id": "r-1", "number": 1, "origin": "elsewhere"}
        await layer.group_send(group_of(ours), message)
        assert await other.silent(0.1)
        model.gate.set()
        events = await tab.to_end()
    assert text_of(events) == "one two three four"
    assert events[-1]["outcome"] == {"type": "success"}


@pytest.mark.django_db(transaction=True)
async def test_a_nudge_holds_no_contents() -> None:
    pair = await sync_to_async(Pair)()
    ours = await Conversation.find("ours-id", user=pair.us)
    layer: Any = get_channel_layer()
    await layer.group_add(group_of(ours), "listener")
    ChannelRelay(layer).nudge(ours, "r-1", 7)
    message = await layer.receive("listener")
    assert message == {
        "type": NUDGE,
        "run_id": "r-1",
        "number": 7,
        "origin": this_process(),
    }


# -- commands --------------------------------------------------------------------------

OTHER = {"BACKEND": "agent_sessions.backends.database.DatabaseBackend"}
# How each is called for our session, by its id and by its owner; what it prints.
COMMANDS: dict[str, tuple[list[list[str]], set[str]]] = {
    "check_agent_sessions": ([["ours-id"], ["--user", "us"]], set()),
    "clear_agent_sessions": (
        [["ours-id", "--noinput"], ["--user", "us", "--noinput"]],
        set(),
    ),
    "copy_agent_sessions": (
        [
            ["ours-id", "--from", "default", "--to", "other"],
            ["--user", "us", "--from", "default", "--to", "other"],
        ],
        set(),
    ),
    "erase_agent_user": ([["us", "--noinput"]], set()),
    "export_agent_sessions": ([["ours-id"], ["--user", "us"]], {"contents"}),
    "import_agent_sessions": (
        [["export", "--from", "SOURCE", "--session-id", "ours-id"]],
        set(),
    ),
    "list_agent_sessions": ([["ours-id"], ["--user", "us"]], set()),
    "rotate_agent_session_keys": ([["--backend", "private", "--wait", "0"]], set()),
    "show_agent_session": ([["ours-id"]], {"contents"}),
}
FROM = ["--from", "default", "--to", "other"]
SOURCE = ["export", "--from", "SOURCE"]
# What is not there, and the exit code.
UNKNOWN: dict[str, list[tuple[list[str], int]]] = {
    "check_agent_sessions": [(["unknown"], 2), (["--user", "unknown"], 2)],
    "clear_agent_sessions": [
        (["unknown", "--noinput"], 1),
        (["--user", "unknown", "--noinput"], 1),
    ],
    "copy_agent_sessions": [
        (["unknown", *FROM], 3),
        (["--user", "unknown", *FROM], 1),
        (FROM, 1),
    ],
    "erase_agent_user": [(["unknown", "--noinput"], 2)],
    "export_agent_sessions": [(["unknown"], 1), (["--user", "unknown"], 1)],
    "import_agent_sessions": [([*SOURCE, "--user", "unknown"], 1), (SOURCE, 1)],
    "list_agent_sessions": [(["unknown"], 1), (["--user", "unknown"], 1)],
    "rotate_agent_session_keys": [(["--backend", "default"], 1)],
    "show_agent_session": [(["unknown"], 1)],
}


def calls() -> list[tuple[str, list[str]]]:
    return [(name, args) for name, (given, _) in COMMANDS.items() for args in given]


def run(name: str, args: list[str], source: Path) -> tuple[str, int]:
    """Call a command; give all that it prints and its exit code."""
    out = io.StringIO()
    args = [str(source) if arg == "SOURCE" else arg for arg in args]
    try:
        call_command(name, *args, stdout=out, stderr=out, verbosity=3)
    except CommandError as exc:
        return f"{out.getvalue()}{exc}", exc.returncode
    return out.getvalue(), 0


def private_settings() -> dict[str, Any]:
    """Return settings with an alias of each kind that commands look for."""
    private = {
        "BACKEND": "agent_sessions.backends.encrypted.EncryptedBackend",
        "OPTIONS": {"backend": "default", "keys": [Fernet.generate_key().decode()]},
    }
    return {"default": OTHER, "other": OTHER, "private": private}


@pytest.fixture
def pair(db: None, settings: Any, tmp_path: Path) -> Pair:
    settings.AGENT_SESSIONS = private_settings()
    pair = Pair()
    run("export_agent_sessions", ["--output", str(tmp_path / "all")], tmp_path)
    return pair


def snapshot(pair: Pair) -> list[Any]:
    """Return all rows of their session."""
    items = SessionItem.objects.for_user(pair.them).order_by("pk")
    rows = AgentSession.objects.for_user(pair.them)
    runs = AgentRun.objects.for_user(pair.them)
    return [list(found.values()) for found in (rows, items, runs)]


def test_each_command_is_in_the_table_and_is_called() -> None:
    found = {name for name, app in get_commands().items() if app == "agent_sessions"}
    rows = tables("Commands")
    assert found == set(rows) == set(COMMANDS) == set(UNKNOWN)
    for name, (_, prints) in COMMANDS.items():
        assert rows[name][2].startswith("contents") is bool(prints), name
        is_quiet = "no contents" in rows[name][2] or "titles" in rows[name][2]
        assert is_quiet is not bool(prints), name
        told = set(map(int, re.findall(r"exit (\d)", rows[name][3])))
        assert told == {code for _, code in UNKNOWN[name]}, name


@pytest.mark.parametrize(("name", "args"), calls())
def test_a_command_touches_and_tells_of_what_was_chosen(
    pair: Pair, tmp_path: Path, name: str, args: list[str]
) -> None:
    before = snapshot(pair)
    if name == "import_agent_sessions":
        AgentSession.objects.for_user(pair.us).delete()
    printed, code = run(name, args, tmp_path / "all")
    assert code == 0, printed
    assert "theirs" not in printed
    assert said("ours", printed) is bool(COMMANDS[name][1])
    assert snapshot(pair) == before


@pytest.mark.parametrize(
    ("name", "args", "exit_code"),
    [(name, *call) for name, given in UNKNOWN.items() for call in given],
)
def test_a_command_refuses_what_is_not_there(
    pair: Pair, tmp_path: Path, name: str, args: list[str], exit_code: int
) -> None:
    before = list(AgentSession.objects.values()), snapshot(pair)
    printed, code = run(name, args, tmp_path / "all")
    assert code == exit_code
    assert not said("ours", printed)
    assert not said("theirs", printed)
    assert (list(AgentSession.objects.values()), snapshot(pair)) == before


def test_an_import_gives_no_session_to_another_owner(
    pair: Pair, tmp_path: Path
) -> None:
    before = snapshot(pair)
    args = ["export", "--from", "SOURCE", "--user", "us"]
    printed, code = run("import_agent_sessions", args, tmp_path / "all")
    assert code == 1
    assert "theirs-id: refused" in printed
    assert not said("theirs", printed)
    assert snapshot(pair) == before


# -- files -----------------------------------------------------------------------------


def test_files_are_for_their_owner_alone(pair: Pair, tmp_path: Path) -> None:
    receipt, export = tmp_path / "receipt", tmp_path / "all"
    args = ["us", "--noinput", "--receipt", str(receipt)]
    assert run("erase_agent_user", args, tmp_path)[1] == 0
    written = {
        "export_agent_sessions --output": export,
        "erase_agent_user --receipt": receipt,
    }
    assert set(tables("Files")) == set(written)
    for path in written.values():
        assert path.stat().st_mode & 0o777 == 0o600
    assert not said("ours", receipt.read_text())
    # What is there stays.
    again = ["them", "--noinput", "--receipt", str(receipt)]
    assert run("erase_agent_user", again, tmp_path)[1] == 2
    assert run("export_agent_sessions", ["--output", str(export)], tmp_path)[1] == 1
    assert AgentSession.objects.for_user(pair.them).exists()
