"""Rows are the truth: primary keys come back after a backup was restored."""

from __future__ import annotations

from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.db import connection

from agent_sessions import DjangoSession
from agent_sessions.exceptions import LeaseLost
from agent_sessions.models import AgentRun, AgentSession, Branch, SessionItem
from agent_sessions.runs import records
from agent_sessions.runs.log import group_of
from agent_sessions.runs.setup import Conversation, RunLimits
from tests.support.chat import Socket, make_user, text_of
from tests.websocket.test_consumer import conversation, speaker

pytestmark = pytest.mark.django_db(transaction=True)


def user(text: str) -> Any:
    return {"role": "user", "content": text}


def texts(items: list[Any]) -> list[str]:
    return [item["content"] for item in items]


@pytest.fixture
def forks(django_user_model: Any) -> list[int]:
    """Read a session that was forked three times in this process; delete its rows."""
    session = DjangoSession("a", user=django_user_model.objects.create_user("alice"))
    session.sync.add_items([user("secret of A"), user("more")])
    for number in range(1, 4):
        session.sync.create_branch_from_turn(2, f"fork_{number}")
        session.sync.add_items([user("more")])
        # By both ways that read: the caller's thread, and the loop.
        session.sync.get_items(10)
        async_to_sync(session.get_items)(10)
        async_to_sync(session.get_items)(10)
    found = list(Branch.objects.order_by("pk").values_list("pk", flat=True))
    assert len(found) == 4
    return found


def restore(keep: int, forks: list[int]) -> None:
    """Put the database back to the moment when `keep` branches were made."""
    with connection.cursor() as cursor:
        table = Branch._meta.db_table
        AgentSession.objects.update(branch=forks[keep - 1])
        for pk in reversed(forks[keep:]):
            SessionItem.objects.filter(branch=pk).delete()
            cursor.execute(f"DELETE FROM {table} WHERE id = %s", [pk])  # noqa: S608
        AgentSession.objects.update(branch=forks[keep - 1])


def start_as(pk: int, session_id: str, owner: Any) -> DjangoSession:
    """Open a new session whose branch is given a certain primary key."""
    row = AgentSession.objects.create(session_id=session_id, user=owner)
    row.branch = Branch.objects.create(pk=pk, session=row)
    row.save()
    return DjangoSession(session_id, user=owner)


@pytest.mark.parametrize("which", [1, 2, 3])
def test_a_branch_with_a_restored_key_shows_nothing_of_another_session(
    forks: list[int], which: int, django_user_model: Any
) -> None:
    restore(which, forks)
    bob = django_user_model.objects.create_user("bob")
    session = start_as(forks[which], "b", bob)
    session.sync.add_items([user("before")])
    session.sync.clear_session()

    assert session.sync.get_items(10) == []
    session.sync.add_items([user("fresh start")])

    for limit in (1, 10, None):
        expected = ["fresh start"]
        assert texts(session.sync.get_items(limit)) == expected
        assert texts(async_to_sync(session.get_items)(limit)) == expected
        # Again: what the first read may have remembered.
        assert texts(async_to_sync(session.get_items)(limit)) == expected
    assert len(session.sync.get_conversation_turns()) == 1
    assert session.sync.list_branches()[0]["message_count"] == 1


def test_a_fork_with_a_restored_key_shows_its_own_ancestors(
    forks: list[int], django_user_model: Any
) -> None:
    restore(2, forks)
    bob = django_user_model.objects.create_user("bob")
    session = start_as(forks[-1] + 10, "b", bob)
    session.sync.add_items([user("one"), user("two"), user("three")])
    row = AgentSession.objects.get(session_id="b")
    # The same parent position as the fork that had this key.
    row.branch = Branch.objects.create(
        pk=forks[2],
        session=row,
        name="fork",
        parent=row.branch,
        fork_position=1,
        head=3,
    )
    row.save()

    session.sync.add_items([user("four")])

    assert texts(session.sync.get_items(10)) == ["one", "four"]
    assert texts(async_to_sync(session.get_items)(10)) == ["one", "four"]


def test_a_parent_in_another_session_shows_nothing(
    forks: list[int], django_user_model: Any
) -> None:
    """Whoever edits the database can't draw another session's items in by a fork."""
    bob = django_user_model.objects.create_user("bob")
    session = start_as(forks[-1] + 10, "b", bob)
    Branch.objects.filter(session__session_id="b").update(
        parent=forks[0], fork_position=2, head=2
    )
    session.sync.add_items([user("mine")])

    assert texts(session.sync.get_items(10)) == ["mine"]
    assert texts(async_to_sync(session.get_items)(10)) == ["mine"]
    assert [turn["content"] for turn in session.sync.get_conversation_turns()] == [
        "mine"
    ]


def test_a_branch_that_is_its_own_ancestor_is_read_once(django_user_model: Any) -> None:
    session = DjangoSession("a")
    session.sync.add_items([user("one"), user("two")])
    branch = Branch.objects.get()
    Branch.objects.update(parent=branch, fork_position=2)

    assert texts(session.sync.get_items(10)) == ["one", "two"]


# -- runs ------------------------------------------------------------------------------


def replace(session_id: str, other_id: str, owner: Any) -> None:
    """Delete a session, and give its primary key to a new one of somebody else."""
    row = AgentSession.objects.get(session_id=session_id)
    pk = row.pk
    row.delete()
    new = AgentSession.objects.create(pk=pk, session_id=other_id, user=owner)
    new.branch = Branch.objects.create(session=new)
    new.save()


@pytest.mark.parametrize("offset", [None, "r-1:0", "r-1:1"])
@pytest.mark.parametrize("same_id", [True, False])
async def test_an_ended_run_is_not_replayed_to_a_session_with_its_key(
    offset: str | None, same_id: bool
) -> None:
    alice, session_id = await conversation()
    async with Socket(session_id, alice, speaker("secret of A")) as tab:
        await tab.say("r-1", "Hello")
        assert text_of(await tab.to_end()) == "secret of A"
    bob = await sync_to_async(make_user)()
    other_id = session_id if same_id else "b"
    await sync_to_async(replace)(session_id, other_id, bob)

    async with Socket(other_id, bob, speaker("fresh start")) as tab:
        await tab.sync(offset)
        assert "secret of A" not in str(await tab.to_end())
        await tab.say("r-1", "Hello")
        assert text_of(await tab.to_end()) == "fresh start"


async def test_no_two_owners_share_a_group_of_the_channel_layer() -> None:
    alice, session_id = await conversation()
    mine = await Conversation.find(session_id, user=alice)
    bob = await sync_to_async(make_user)()
    await sync_to_async(replace)(session_id, session_id, bob)
    theirs = await Conversation.find(session_id, user=bob)

    assert mine.pk == theirs.pk
    assert group_of(mine) != group_of(theirs)
    assert group_of(theirs) == group_of(await Conversation.find(session_id, user=bob))


# --- leases ----------------------------------------------------------------------------


def begin(session: DjangoSession) -> int:
    """Begin a run on a session, and give the number of its lease."""
    row = AgentSession.objects.get(session_id=session.session_id)
    held = Conversation(row.pk, session.backend, session.key)
    lease = records.begin(held, "run", model="", limits=RunLimits(stale_after=60))
    assert lease is not None
    return lease.fence


def test_a_run_of_a_deleted_session_writes_nothing_into_the_one_made_after_it() -> None:
    for number in range(2):
        session = DjangoSession("again")
        session.sync.add_items([user(f"life {number}")])
        fence = begin(session)
        if number == 0:
            old = session.fenced(fence)
            AgentSession.objects.all().delete()
    for late in (old.sync.add_items, async_to_sync(old.add_items)):
        with pytest.raises(LeaseLost):
            late([user("of the life before")])
    session.fenced(fence).sync.add_items([user("in time")])
    assert texts(session.sync.get_items()) == ["life 1", "in time"]


def test_a_run_of_before_a_restored_backup_writes_nothing_afterwards() -> None:
    session = DjangoSession("restored")
    session.sync.add_items([user("kept")])
    backup = AgentSession.objects.values("fence", "run_id", "state").get()
    old = session.fenced(begin(session))
    AgentSession.objects.update(**backup)
    AgentRun.objects.all().delete()
    begin(session)
    with pytest.raises(LeaseLost):
        old.sync.add_items([user("of the time that was undone")])
    assert texts(session.sync.get_items()) == ["kept"]
