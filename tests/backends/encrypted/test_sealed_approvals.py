"""Approvals against who can change rows: an approval opens for its run, once, in time.

All runs here are real ones, on plain and encrypted aliases. Every run gives its call
the same id, as small models do, so that nothing hangs on ids that can't be guessed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
from agents import Agent, function_tool
from agents.testing import ScriptedModel, assistant_message, function_call
from asgiref.sync import sync_to_async
from django.core.cache import cache
from django.core.management import CommandError, call_command
from django.db import connection
from django.test import AsyncClient, Client, override_settings
from django.test.utils import CaptureQueriesContext
from django.urls import path, reverse
from django.utils import timezone
from django.views.debug import ExceptionReporter

from agent_sessions import get_session
from agent_sessions.agui import RunRequest
from agent_sessions.consumers import CLOSE_UNAVAILABLE
from agent_sessions.exceptions import InvalidApproval, UnknownInterrupt
from agent_sessions.models import (
    AgentRun,
    AgentSession,
    Branch,
    SessionItem,
    SessionSecret,
)
from agent_sessions.runs import Conversation, RunLimits, records, recovery
from agent_sessions.runs.resuming import claimable
from agent_sessions.views import SessionListView
from tests.backends.encrypted.test_encrypted import under
from tests.encryption.test_encryption import NEW, OLD
from tests.runs.test_runs import approve
from tests.support.admin_pages import LIST, page, staff, url
from tests.support.chat import Socket, create_conversation, make_user
from tests.support.waiting import opened, reseal, wait
from tests.urls import urlpatterns as tested_urls

if TYPE_CHECKING:
    from django.contrib.auth.models import User

pytestmark = pytest.mark.django_db(transaction=True)

RUNS = "admin:agent_sessions_agentrun_changelist"
paid: list[int] = []
urlpatterns = [
    *tested_urls,
    path("plain/", SessionListView.as_view()),
    path("private/", SessionListView.as_view(backend="private")),
]


@function_tool(needs_approval=True)
def pay(amount: int) -> str:
    """Pay an amount."""
    paid.append(amount)
    return f"paid {amount}"


@pytest.fixture(
    params=[
        "plain",
        # The same statements, with other texts.
        pytest.param("private", marks=pytest.mark.one_database),
        pytest.param("own keys", marks=pytest.mark.one_database),
    ],
    name="alias",
)
def _alias(request: pytest.FixtureRequest) -> Iterator[str]:
    cache.clear()
    paid.clear()
    with (
        under(NEW, session_keys=request.param == "own keys"),
        override_settings(ROOT_URLCONF=__name__),
    ):
        yield "default" if request.param == "plain" else "private"


def payer(*amounts: int, call_id: str = "call_1") -> Agent[Any]:
    """Make an agent that pays; each amount takes a run, and one to go on."""
    steps: list[Any] = []
    for amount in amounts:
        call = function_call("pay", {"amount": amount}, call_id=call_id)
        steps += [[call], [assistant_message(f"after {amount}")]]
    steps += [[assistant_message("hello")]] * 3
    return Agent(name="payer", model=ScriptedModel(steps), tools=[pay])


@asynccontextmanager
async def chat(alias: str, *amounts: int, user: Any = None, **options: Any) -> Any:
    user = user or await sync_to_async(make_user)()
    row = await sync_to_async(create_conversation)(user, backend=alias)
    agent = payer(*amounts)
    tab = Socket(row.session_id, user, agent, backend=alias, **options)
    async with tab:
        yield tab


async def ask(tab: Socket, run_id: str) -> AgentRun:
    """Start a run that pauses on its call; return its row."""
    await tab.say(run_id, "Pay, please")
    assert (await tab.to_end())[-1]["outcome"]["type"] == "interrupt"
    run: AgentRun = await AgentRun.objects.select_related("session").aget(
        run_id=run_id, session__session_id=tab.session_id
    )
    return run


async def answer(tab: Socket, run_id: str, **payload: Any) -> str | None:
    """Answer the call; give the code of a refusal."""
    await tab.answer(run_id, approve(**payload))
    return (await tab.to_end())[-1].get("code")


async def answer_anew(tab: Socket, run_id: str) -> str | None:
    """Answer as a page does that was opened later."""
    await tab.sync()
    await tab.to_end()
    return await answer(tab, run_id)


async def test_an_answer_to_an_earlier_pause_is_none_to_a_later_one(
    alias: str,
) -> None:
    async with chat(alias, 1, 9999) as tab:
        await ask(tab, "r-1")
        stale = approve(tab.asked["call_1"])
        assert await answer(tab, "r-2", approved=False) is None
        await ask(tab, "r-3")
        await tab.answer("r-4", stale)
        assert (await tab.to_end())[-1]["code"] == "unknown_interrupt"
        assert paid == []
        assert await answer(tab, "r-5") is None
    assert paid == [9999]


@pytest.mark.parametrize(("second", "expected"), [(False, []), (True, [1, 2])])
async def test_calls_of_one_id_are_made_where_each_is_approved(
    alias: str, second: bool, expected: list[int]
) -> None:
    tools: list[Any] = []
    for amount in (1, 2):
        model = payer(amount).model
        inner = Agent(name=f"payer {amount}", model=model, tools=[pay])
        tools.append(inner.as_tool(f"ask_{amount}", "Ask."))
    calls = [
        function_call(f"ask_{n}", {"input": "?"}, call_id=f"outer_{n}") for n in (1, 2)
    ]
    steps: list[Any] = [calls, [assistant_message("done")]]
    agent = Agent(name="outer", model=ScriptedModel(steps), tools=tools)
    user = await sync_to_async(make_user)()
    row = await sync_to_async(create_conversation)(user, backend=alias)
    async with Socket(row.session_id, user, agent, backend=alias) as tab:
        await tab.say("r-1", "Pay, please")
        asked = (await tab.to_end())[-1]["outcome"]["interrupts"]
        assert [each["toolCallId"] for each in asked] == ["call_1", "call_1"]
        entries = [approve(each["id"]) for each in asked]
        entries[-1]["payload"] = {"approved": second}
        await tab.answer("r-2", *entries)
        assert (await tab.to_end())[-1]["type"] == "RUN_FINISHED"
    assert sorted(paid) == expected


async def put(run: AgentRun, **columns: Any) -> None:
    """Write columns of a run, as who has the database can."""
    await AgentRun.objects.filter(pk=run.pk).aupdate(**columns)


async def put_session(run: AgentRun, **columns: Any) -> None:
    await AgentSession.objects.filter(pk=run.session_id).aupdate(**columns)


async def assert_closed(tab: Socket, run: AgentRun, run_id: str) -> None:
    """Nobody can answer any more, and the session takes a message."""
    code = await answer(tab, run_id)
    if code == "internal":
        # Another session's own key passes for one that is missing here, so the
        # approval is left alone: until its time is over.
        assert await SessionSecret.objects.aexists()
        await put(run, expires_at=timezone.now())
        code = await answer(tab, f"{run_id}-late")
        assert code == "interrupt_expired"
    else:
        assert code == "invalid_approval"
    await assert_not_shown(tab, run)
    await assert_goes_on(tab, f"{run_id}-next")


async def assert_goes_on(tab: Socket, run_id: str) -> None:
    """The session takes a message, and nobody is asked anything any more."""
    await tab.say(run_id, "Hello?")
    assert (await tab.to_end())[-1]["type"] == "RUN_FINISHED"
    row = await AgentSession.objects.aget(session_id=tab.session_id)
    assert row.state == "idle"


async def assert_not_shown(tab: Socket, run: AgentRun) -> None:
    """Neither the admin, nor REST, nor a sync of the page shows an approval."""
    row = await AgentSession.objects.select_related("user").aget(pk=run.session_id)
    rest = AsyncClient()
    await rest.aforce_login(cast("User", row.user))
    where = "/plain/" if row.backend == "default" else "/private/"
    found = (await rest.get(where)).json()["sessions"]
    assert {each["id"]: each["state"] for each in found}[row.session_id] == "idle"
    await sync_to_async(_assert_not_in_admin)(run)
    await tab.sync()
    events = await tab.to_end()
    assert events[-1].get("outcome", {}).get("type") != "interrupt"


def _assert_not_in_admin(run: AgentRun) -> None:
    client = staff("view", "read", runs=True, name=f"staff {run.pk}")
    change = reverse("admin:agent_sessions_agentrun_change", args=(run.pk,))
    for address in (change, reverse(RUNS), reverse(LIST)):
        html = page(client, address)
        assert "as-state-waiting" not in html
        assert "as-asked" not in html


# -- other runs ------------------------------------------------------------------------


async def test_what_was_refused_does_not_open_in_a_later_run(
    alias: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with chat(alias, 987654, 1) as tab:
        first = await ask(tab, "r-1")
        assert await answer(tab, "r-2", approved=False) is None
        second = await ask(tab, "r-3")
        await put(second, state=first.state)
        assert await answer(tab, "r-4") == "invalid_approval"
        assert paid == []
        second = await AgentRun.objects.aget(run_id="r-3")
        assert (second.status, second.state) == ("cancelled", "")
        assert second.error_code == "invalid_approval"
        await assert_goes_on(tab, "r-5")
    assert "987654" not in caplog.text


async def test_what_was_approved_does_not_open_in_a_later_run(alias: str) -> None:
    async with chat(alias, 5, 1) as tab:
        first = await ask(tab, "r-1")
        assert await answer(tab, "r-2") is None
        second = await ask(tab, "r-3")
        await put(second, state=first.state)
        await assert_not_shown(tab, second)
        # The sync has withdrawn it.
        assert await answer(tab, "r-4") == "unknown_interrupt"
        await assert_goes_on(tab, "r-5")
    assert paid == [5]


@pytest.mark.parametrize("place", ["own", "other owner", "other alias"])
async def test_runs_of_two_sessions_cannot_be_swapped(alias: str, place: str) -> None:
    user = await sync_to_async(make_user)()
    other_user = await sync_to_async(make_user)() if place == "other owner" else user
    other_alias = {"default": "private", "private": "default"}[alias]
    where = other_alias if place == "other alias" else alias
    async with (
        chat(alias, 1, user=user) as one,
        chat(where, 987654, user=other_user) as two,
    ):
        first, second = await ask(one, "r-1"), await ask(two, "r-1")
        await put(first, state=second.state)
        await put(second, state=first.state)
        for tab, run in ((one, first), (two, second)):
            await assert_closed(tab, run, "r-2")
    assert paid == []


async def test_a_run_that_is_moved_to_another_session_does_not_open(alias: str) -> None:
    user = await sync_to_async(make_user)()
    async with chat(alias, 1, user=user) as one, chat(alias, 2, user=user) as two:
        first, second = await ask(one, "r-1"), await ask(two, "r-2")
        # All that names a place, but for the row's own key.
        await second.adelete()
        await put(first, session_id=second.session_id, branch_id=second.branch_id)
        await put_session(second, fence=first.session.fence)
        await assert_closed(two, first, "r-3")
    assert paid == []


async def test_a_session_that_takes_the_place_of_another_gets_no_approval(
    alias: str,
) -> None:
    """Deleted and made again under the same id, owner and alias."""
    async with chat(alias, 987654) as tab:
        first = await ask(tab, "r-1")
    fence = first.session.fence
    secrets = [row async for row in SessionSecret.objects.all()]
    row = await AgentSession.objects.select_related("user").aget()

    def make_again() -> AgentSession:
        session = get_session(row.session_id, user=row.user, backend=alias)
        session.sync.clear_session()
        row.delete()
        session = get_session(row.session_id, user=row.user, backend=alias)
        session.sync.add_items([{"role": "user", "content": "Hi"}])
        # With the key that it had, where it had one.
        SessionSecret.objects.all().delete()
        SessionSecret.objects.bulk_create(secrets)
        return AgentSession.objects.get()

    new = await sync_to_async(make_again)()
    values = {"run_id": "r-1", "status": "waiting", "state": first.state}
    run = await AgentRun.objects.acreate(pk=first.pk, session=new, **values)
    await put_session(run, state="waiting", fence=fence)
    async with Socket(row.session_id, row.user, payer(1), backend=alias) as again:
        assert await answer(again, "r-2") == "invalid_approval"
    assert paid == []


# -- the same run ----------------------------------------------------------------------


@pytest.mark.parametrize("approved", [True, False])
@pytest.mark.parametrize("edit", ["status", "session", "fence", "newest"])
async def test_what_was_answered_does_not_open_again(
    alias: str, edit: str, approved: bool
) -> None:
    async with chat(alias, 7) as tab:
        first = await ask(tab, "r-1")
        assert await answer(tab, "r-2", approved=approved) is None
        await put(first, status="waiting", state=first.state, resumed_by=None)
        if edit != "status":
            await put_session(first, state="waiting")
        if edit in {"fence", "newest"}:
            await put_session(first, fence=first.session.fence)
        if edit == "newest":
            # The row is written anew, under the highest key.
            await AgentRun.objects.filter(pk=first.pk).adelete()
            copy = await AgentRun.objects.aget(run_id="r-2")
            copy.pk, copy.run_id = None, "r-1"
            copy.status, copy.state = AgentRun.Status.WAITING, first.state
            await copy.asave()
            first = copy
        code = await answer(tab, "r-3")
        assert code in {"invalid_approval", "unknown_interrupt"}
        await assert_not_shown(tab, first)
        await assert_goes_on(tab, "r-4")
    assert paid == ([7] if approved else [])


@pytest.mark.parametrize("how", ["cleared", "late", "invalid"])
async def test_what_was_withdrawn_does_not_open_again(alias: str, how: str) -> None:
    async with chat(alias, 987654) as tab:
        first = await ask(tab, "r-1")
        if how == "cleared":
            row = await AgentSession.objects.select_related("user").aget()
            session = get_session(row.session_id, user=row.user, backend=alias)
            secrets = [row async for row in SessionSecret.objects.all()]
            await session.clear_session()
            await SessionSecret.objects.abulk_create(secrets)
        else:
            past = timezone.now() - timedelta(minutes=1)
            change = {"expires_at": past} if how == "late" else {"state": "?"}
            await put(first, **change)
            expected = "interrupt_expired" if how == "late" else "invalid_approval"
            assert await answer(tab, "r-2") == expected
        await put(
            first, status="waiting", state=first.state, expires_at=first.expires_at
        )
        await put_session(first, state="waiting")
        assert await answer(tab, "r-3") == "invalid_approval"
        await assert_goes_on(tab, "r-4")
    assert paid == []


@pytest.mark.parametrize(
    "columns",
    [
        {"run_id": "r-9"},
        {"state": ""},
        {"state": "{}"},
        {"state": '{"__enc__": 1, "v": 2, "kid": "x", "payload": "x", "id": "x"}'},
        {"state": "\N{SNOWMAN}:\n:" + "[" * 10_000},
    ],
    ids=lambda columns: str(columns)[:30],
)
async def test_a_changed_row_does_not_open(alias: str, columns: Any) -> None:
    async with chat(alias, 987654) as tab:
        run = await ask(tab, "r-1")
        await put(run, **columns)
        code = await answer(tab, "r-2")
        assert paid == []
        if "kid" in columns.get("state", "") and alias == "private":
            # The key may only be missing here: nothing is thrown away.
            assert code == "internal"
            return
        assert code == "invalid_approval"
        await assert_goes_on(tab, "r-3")


@pytest.mark.parametrize("old", ["987654", '"expires_at": ', '"kind": "approval"'])
async def test_a_signed_text_cannot_be_edited(old: str) -> None:
    """Without encryption the text can be read, and that is all."""
    paid.clear()
    cache.clear()
    async with chat("default", 987654) as tab:
        run = await ask(tab, "r-1")
        assert old in run.state
        await put(run, state=run.state.replace(old, f"{old}1".replace('"1', '1"')))
        assert await answer(tab, "r-2") == "invalid_approval"
        await assert_goes_on(tab, "r-3")
    assert paid == []


async def test_a_new_owner_of_a_session_gets_no_approval(alias: str) -> None:
    async with chat(alias, 987654) as tab:
        run = await ask(tab, "r-1")
    user = await sync_to_async(make_user)()
    await put_session(run, user_id=user.pk)
    await SessionSecret.objects.aupdate(owner=str(user.pk))
    async with Socket(tab.session_id, user, payer(), backend=alias) as theirs:
        assert await answer(theirs, "r-2") == "invalid_approval"
    assert paid == []


def asks(tab: Socket, run_id: str) -> RunRequest:
    """Return the request of a tab that answers its first call."""
    resume = [{"interruptId": tab.asked["call_1"]}]
    return RunRequest(tab.session_id, run_id, resume=resume)


async def test_what_was_paused_again_is_neither_claimed_nor_withdrawn(
    alias: str,
) -> None:
    """By who had read the session before it went on."""
    async with chat(alias, 1, 2) as tab:
        user = cast(
            "User", (await AgentSession.objects.select_related("user").aget()).user
        )
        here = await Conversation.find(tab.session_id, user=user, backend=alias)
        await ask(tab, "r-1")
        found = await sync_to_async(claimable)(here, asks(tab, "r-9"), 60)
        assert found is not None
        assert await answer(tab, "r-2") is None
        run = await ask(tab, "r-3")
        assert not await sync_to_async(recovery.withdraw)(here, found.fence)
        # As if the row of the first still waited.
        await put(found.run, status="waiting")
        with pytest.raises(UnknownInterrupt):
            await sync_to_async(records.begin)(
                here, "r-4", model="", limits=RunLimits(), after=found
            )
        assert (await AgentRun.objects.aget(pk=run.pk)).status == "waiting"
        await put(found.run, status="completed")
        assert await answer(tab, "r-5") is None
    assert paid == [1, 2]


async def test_a_copied_row_does_not_open(alias: str) -> None:
    async with chat(alias, 987654) as tab:
        run = await ask(tab, "r-1")
        copy = await AgentRun.objects.aget(pk=run.pk)
        copy.pk, copy.run_id = None, "r-2"
        await copy.asave()
        assert await answer(tab, "r-3") == "invalid_approval"
        assert await answer(tab, "r-4") == "unknown_interrupt"
    assert paid == []


async def test_a_changed_fence_closes_the_approval(alias: str) -> None:
    async with chat(alias, 987654) as tab:
        run = await ask(tab, "r-1")
        await put_session(run, fence=run.session.fence + 1)
        await assert_not_shown(tab, run)
        await assert_goes_on(tab, "r-2")
    assert paid == []


@pytest.mark.parametrize("column", [None, timezone.now() + timedelta(days=999)])
async def test_an_expired_approval_stays_expired(alias: str, column: Any) -> None:
    limits = RunLimits(approval_timeout=timedelta(0))
    async with chat(alias, 987654, limits=limits) as tab:
        run = await ask(tab, "r-1")
        await put(run, expires_at=column)
        await sync_to_async(_assert_not_in_admin)(run)
        assert await answer(tab, "r-2") == "interrupt_expired"
        await assert_goes_on(tab, "r-3")
    assert paid == []


async def test_a_restored_backup_opens_again(alias: str) -> None:
    """All rows as they were once can't be told from that time: see the docs."""
    async with chat(alias, 5) as tab:
        await ask(tab, "r-1")
        kept = [
            (model, [row async for row in model._base_manager.all()])
            for model in (AgentSession, Branch, SessionItem, AgentRun, SessionSecret)
        ]
        assert await answer(tab, "r-2") is None
        await AgentRun.objects.all().adelete()
        await SessionItem.objects.all().adelete()
        for _, rows in kept:
            for row in rows:
                await sync_to_async(row.save_base)(raw=True)
    row = await AgentSession.objects.select_related("user").aget(state="waiting")
    async with Socket(row.session_id, row.user, payer(), backend=alias) as tab:
        assert await answer_anew(tab, "r-3") is None
    assert paid == [5, 5]


async def test_copies_and_exports_take_no_approval_along(
    alias: str, tmp_path: Path
) -> None:
    async with chat(alias, 5) as tab:
        run = await ask(tab, "r-1")
        other = {"default": "private", "private": "default"}[alias]
        ways = (tab.session_id, "--from", alias, "--to", other)

        def copy_session() -> str:
            said = StringIO()
            with contextlib.suppress(CommandError):
                # To an alias that doesn't encrypt.
                ways_in = (*ways, "--in-clear")
                call_command("copy_agent_sessions", *ways_in, stdout=said, stderr=said)
            return said.getvalue()

        assert (
            "refused: it waits for an approval" in await sync_to_async(copy_session)()
        )
        # Only what can be answered is in the way.
        await put(run, run_id="r-9")
        assert "sessions new 1" in await sync_to_async(copy_session)()
        await put(run, run_id="r-1")
        copy = await AgentRun.objects.aget(session__backend=other)
        assert (copy.status, copy.state) == ("interrupted", "")
        assert copy.expires_at is None
        out = StringIO()
        await sync_to_async(call_command)(
            "export_agent_sessions", tab.session_id, stdout=out
        )
        assert run.state not in out.getvalue()
        # Here it is open all the same.
        assert await answer(tab, "r-2") is None
    assert paid == [5]


# -- shown and done --------------------------------------------------------------------


@pytest.mark.parametrize("call_id", ["call_1", "call_2"])
async def test_a_run_does_nothing_that_was_not_shown(
    alias: str, call_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Sealed by who has the keys: a state that waits for other calls than are shown."""
    user = await sync_to_async(make_user)()
    async with chat(alias, 1, user=user) as tab:
        run = await ask(tab, "r-1")
        row = await sync_to_async(create_conversation)(user, backend=alias)
        agent = payer(987654, call_id=call_id)
        async with Socket(row.session_id, user, agent, backend=alias) as other:
            await ask(other, "r-other")
        state = (await sync_to_async(opened)("r-other")).state
        await sync_to_async(reseal)("r-1", state=state)
        assert await answer(tab, "r-2") == "invalid_approval"
        assert paid == []
        run = await AgentRun.objects.aget(pk=run.pk)
        assert (run.status, run.error_code) == ("cancelled", "invalid_approval")
        await assert_goes_on(tab, "r-3")
    assert "987654" not in caplog.text


@pytest.mark.parametrize("state", ["", "{}", "[", '{"$schemaVersion": "1.21"}', "7"])
async def test_a_state_that_the_sdk_cannot_read_is_withdrawn(
    alias: str, state: str
) -> None:
    async with chat(alias, 5) as tab:
        run = await ask(tab, "r-1")
        await sync_to_async(reseal)("r-1", state=state)
        assert await answer(tab, "r-2") == "outdated_approval"
        run = await AgentRun.objects.aget(pk=run.pk)
        assert (run.status, run.error_code) == ("cancelled", "outdated_approval")
        await assert_goes_on(tab, "r-3")
    assert paid == []


# -- keys ------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [False, True])
async def test_an_approval_under_a_missing_key_waits_for_the_key(own: bool) -> None:
    paid.clear()
    cache.clear()
    with under(NEW, session_keys=own):
        async with chat("private", 5) as tab:
            run = await ask(tab, "r-1")
    row = await AgentSession.objects.select_related("user").aget()

    def socket() -> Socket:
        return Socket(row.session_id, row.user, payer(), backend="private")

    with under(OLD, session_keys=own), override_settings(ROOT_URLCONF=__name__):
        async with socket() as tab:
            assert await answer(tab, "r-2") == "internal"
            await tab.say("r-3", "Hello?")
            assert (await tab.frame())["chunk"]["code"] == "internal"
            await tab.sync()
            assert await tab.closed() == CLOSE_UNAVAILABLE
        await sync_to_async(_assert_not_in_admin)(run)
        # Not cleared either, without being told to.
        with pytest.raises(Exception, match="left"):
            await sync_to_async(call_command)(
                "clear_agent_sessions", row.session_id, "--backend", "private"
            )
    with under(NEW, session_keys=own):
        async with socket() as tab:
            assert await answer_anew(tab, "r-4") is None
    assert paid == [5]


async def test_an_approval_outlives_a_rotation(alias: str) -> None:
    async with chat(alias, 5) as tab:
        run = await ask(tab, "r-1")
    row = await AgentSession.objects.select_related("user").aget()
    own = await SessionSecret.objects.aexists()
    if alias == "private":
        with under(OLD, NEW, session_keys=own):
            await sync_to_async(call_command)("rotate_agent_session_keys")
        with under(OLD, session_keys=own):
            async with Socket(row.session_id, row.user, payer(), backend=alias) as tab:
                assert await answer_anew(tab, "r-2") is None
    else:
        with override_settings(
            SECRET_KEY="a new one", SECRET_KEY_FALLBACKS=["only for tests"]
        ):
            async with Socket(row.session_id, row.user, payer(), backend=alias) as tab:
                assert await answer_anew(tab, "r-2") is None
    assert paid == [5]
    assert run.state


async def test_without_the_secret_key_of_its_time_an_approval_is_over() -> None:
    paid.clear()
    cache.clear()
    user = await sync_to_async(make_user)()
    async with chat("default", 5, user=user) as tab:
        await ask(tab, "r-1")
    # As after a restart: a socket of before would be closed, like a browser's session.
    with override_settings(SECRET_KEY="a new one"):
        async with Socket(tab.session_id, user, payer()) as later:
            assert await answer(later, "r-2") == "invalid_approval"
            await assert_goes_on(later, "r-3")
    assert paid == []


@pytest.mark.parametrize("change", [{"run_id": "r-9"}, {"state": "x987654"}])
async def test_an_error_report_shows_nothing_of_it(alias: str, change: Any) -> None:
    async with chat(alias, 987654) as tab:
        run = await ask(tab, "r-1")
        if "state" in change:
            change = {"state": run.state.replace("987654", "9876540") + "0"}
        await put(run, **change)
        user = cast(
            "User", (await AgentSession.objects.select_related("user").aget()).user
        )
        here = await Conversation.find(tab.session_id, user=user, backend=alias)
        with pytest.raises(InvalidApproval) as caught:
            await sync_to_async(claimable)(here, asks(tab, "r-10"), 60)
    reporter = ExceptionReporter(None, caught.type, caught.value, caught.tb)
    with override_settings(DEBUG=False):
        text = reporter.get_traceback_text()
    assert "InvalidApproval" in text
    assert "987654" not in text


# -- pages -----------------------------------------------------------------------------


def test_lists_take_as_many_queries_for_many_approvals(alias: str) -> None:
    user = make_user()

    def another(number: int) -> None:
        row = create_conversation(user, backend=alias)
        session = get_session(row.session_id, user=user, backend=alias)
        session.sync.add_items([{"role": "user", "content": "Hi"}])
        wait(AgentSession.objects.get(pk=row.pk), f"r-{number}")

    reader = staff("view", "read", runs=True)
    owner = Client()
    owner.force_login(user)
    rest = "/plain/" if alias == "default" else "/private/"

    def count(client: Client, address: str) -> int:
        client.get(address)
        with CaptureQueriesContext(connection) as queries:
            html = page(client, address)
        assert "waiting" in html
        return len(queries)

    pages = [(reader, reverse(RUNS)), (reader, reverse(LIST)), (owner, rest)]
    another(0)
    before = [count(*each) for each in pages]
    for number in range(1, 12):
        another(number)
    assert [count(*each) for each in pages] == before
    assert page(reader, reverse(RUNS)).count("<code>refund</code>") == 12
    assert owner.get(rest).content.count(b'"waiting"') == 12


def test_a_waiting_session_is_shown_as_one(alias: str) -> None:
    user = make_user()
    row = create_conversation(user, backend=alias)
    run = wait(row)
    reader = staff("view", "read", runs=True)
    assert "as-state-waiting" in page(reader, url("change", row))
    run.expires_at = timezone.now()
    run.save()
    assert "as-state-waiting" not in page(reader, url("change", row))
    row.refresh_from_db()
    assert row.state == "waiting"
