"""Runs that your own code starts, hears and stops; open tabs of the session see them."""

from __future__ import annotations

import asyncio
import os
import threading
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, Unpack
from weakref import finalize

from asgiref.sync import async_to_sync

from agent_sessions.agui import RunRequest, StreamOptions
from agent_sessions.backends.base import make_key
from agent_sessions.concurrency.connections import waiting_loop, without_caller
from agent_sessions.concurrency.forks import new_lock
from agent_sessions.concurrency.loops import serve
from agent_sessions.exceptions import (
    BlockingCall,
    RunFailed,
    RunPaused,
    RunStopped,
    SessionBusy,
    UnknownInterrupt,
)
from agent_sessions.handler import DEFAULT_ALIAS, sessions
from agent_sessions.runs.active import ActiveRun
from agent_sessions.runs.failures import in_words
from agent_sessions.runs.log import Event, Subscription
from agent_sessions.runs.manager import RunManager, get_run_manager
from agent_sessions.runs.resuming import find_waiting
from agent_sessions.runs.setup import Conversation, RunLimits, RunSetup
from agent_sessions.times import pauses

if TYPE_CHECKING:
    from agents import Agent, RunConfig, RunErrorHandlers, RunHooks
    from django.contrib.auth.base_user import AbstractBaseUser

    from agent_sessions.windows import SessionInputCallback

T = TypeVar("T")
Mode = Literal["immediate", "after_turn"]


class RunOptions(TypedDict, total=False):
    """What start_run() takes beside the message and the session."""

    backend: str
    # Seconds to wait for a session that is busy; None raises SessionBusy at once.
    wait: float | None
    limits: RunLimits
    context: Any
    run_config: RunConfig | None
    hooks: RunHooks[Any] | None
    error_handlers: RunErrorHandlers[Any] | None
    max_turns: int | None
    options: StreamOptions
    window: SessionInputCallback | None


class Run:
    """A run of this process, as the code that has started it sees it."""

    def __init__(self, manager: RunManager, run: ActiveRun) -> None:
        self._manager = manager
        self._run = run
        self.run_id = run.run_id
        self.session_id = run.conversation.session_id

    async def events(self) -> AsyncGenerator[Event]:
        """Hear the AG-UI events of the run from its start to its end.

        They are those that a socket gets. A reader that falls behind gets a snapshot in
        place of what it has missed.
        """
        manager, conversation = self._manager, self._run.conversation
        setup, listener = self._run.setup, Subscription()
        sync = partial(
            manager.sync,
            conversation,
            listener,
            options=setup.options,
            stale_after=setup.limits.stale_after,
        )
        start = f"{self.run_id}:0"
        try:
            await sync(offset=start)
            while True:
                frame = await listener.get()
                if frame is None:
                    last = listener.last if listener.open.run_id else None
                    offset = start if last is None else last.id
                    await sync(offset=offset, begins=last is None)
                    continue
                yield in_words(frame.event)
                if frame.is_last:
                    return
        finally:
            manager.unsubscribe(conversation, listener)

    async def result(self) -> Any:
        """Wait for the end of the run and return its final output.

        Raises RunFailed, RunStopped, and RunPaused if it waits for an approval.
        """
        await self.ended()
        last = self._run.last_event
        outcome = last.get("outcome") or {}
        if outcome.get("type") == "success":
            return self._run.final_output
        if outcome.get("type") == "cancelled":
            raise RunStopped(self.run_id)
        if outcome.get("type") == "interrupt":
            raise RunPaused(self.run_id, outcome["interrupts"])
        raise RunFailed(self.run_id, last.get("code", "interrupted"))

    async def stop(self, mode: Mode = "immediate") -> None:
        """Stop the run, at once or after its turn, and wait for its end."""
        self._run.abort(mode)
        await self.ended()

    async def ended(self) -> None:
        """Wait for the end of the run."""
        if self._run.task is not None:
            await asyncio.wait({self._run.task})


async def start_run(
    agent: Agent[Any],
    message: str | list[dict[str, Any]],
    *,
    session_id: str,
    user: AbstractBaseUser | None = None,
    **options: Unpack[RunOptions],
) -> Run:
    """Start a run in this process and return at once; open tabs see it.

    `message` is text, or a list of AG-UI's content parts. The session is made if it isn't
    there. The run goes on without listeners, as long as the event loop runs. Raises
    SessionBusy, InterruptsPending, ShuttingDown, SessionDoesNotExist and StorageError.
    """
    store = sessions[options.get("backend", DEFAULT_ALIAS)]
    key = make_key(session_id, user)
    conversation = await store.threads.run(Conversation.ensure, store, key)
    run_id = uuid.uuid4().hex
    asked = {"id": f"user-{run_id}", "role": "user", "content": message}
    request = RunRequest(session_id, run_id, [asked])
    return await _start(conversation, request, agent, options)


async def answer_run(
    agent: Agent[Any],
    approved: bool | Mapping[str, bool],
    *,
    session_id: str,
    user: AbstractBaseUser | None = None,
    reason: str = "",
    always: bool = False,
    **options: Unpack[RunOptions],
) -> Run:
    """Answer all open approvals of a session, and return the run that goes on.

    `approved` is one answer for all calls, or one for each by its call's id. The model is
    told the `reason` of what is refused. With `always` the answers hold for later calls
    of the tools too. Raises UnknownInterrupt where nothing waits, other calls do, or
    somebody has answered before, InterruptExpired, InvalidApproval, UnreadableState,
    and what start_run() raises.
    """
    alias = options.get("backend", DEFAULT_ALIAS)
    conversation = await Conversation.find(session_id, user=user, backend=alias)
    stale_after = options.get("limits", RunLimits()).stale_after
    threads = conversation.backend.threads
    run = await threads.run(find_waiting, conversation, stale_after)
    calls = [interrupt["toolCallId"] for interrupt in run.interrupts]
    given = (
        approved if isinstance(approved, Mapping) else dict.fromkeys(calls, approved)
    )
    if set(given) != set(calls):
        raise UnknownInterrupt(
            "Answer every open approval of this conversation, and no other."
        )
    more = {"reason": reason} if reason else {}
    answers = [
        {
            "interruptId": interrupt["id"],
            "status": "resolved",
            "payload": {"approved": given[call_id], "always": always, **more},
        }
        for call_id, interrupt in zip(calls, run.interrupts, strict=True)
    ]
    request = RunRequest(session_id, uuid.uuid4().hex, resume=answers)
    return await _start(conversation, request, agent, options)


async def _start(
    conversation: Conversation,
    request: RunRequest,
    agent: Agent[Any],
    options: RunOptions,
) -> Run:
    """Start a run, once its session is free."""
    given: dict[str, Any] = {**options}
    given.pop("backend", None)
    wait = given.pop("wait", None)
    limits = replace(given.pop("limits", RunLimits()), detach_timeout=None)
    setup = RunSetup(agent, limits=limits, **given)
    manager = get_run_manager()
    for pause in pauses(wait):
        try:
            run = await manager.start(conversation, request, setup)
            break
        except SessionBusy:
            if pause is None:
                raise
        await asyncio.sleep(pause)
    if run is None:
        raise RuntimeError("a random id was used before")
    return Run(manager, run)


# -- without an event loop -------------------------------------------------------------


class SyncRun:
    """A run as synchronous code sees it; it goes on in another thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, run: Run) -> None:
        self._loop = loop
        self._run = run
        self.run_id = run.run_id
        self.session_id = run.session_id

    def events(self) -> Iterator[Event]:
        """See Run.events()."""
        end = object()
        events = self._run.events()
        try:
            while (event := _wait(self._loop, anext, events, end)) is not end:
                yield event
        finally:
            _wait(self._loop, events.aclose)

    def result(self) -> Any:
        """See Run.result()."""
        return _wait(self._loop, self._run.result)

    def stop(self, mode: Mode = "immediate") -> None:
        """See Run.stop()."""
        _wait(self._loop, self._run.stop, mode)


def start_run_sync(
    agent: Agent[Any],
    message: str | list[dict[str, Any]],
    *,
    session_id: str,
    user: AbstractBaseUser | None = None,
    **options: Unpack[RunOptions],
) -> SyncRun:
    """Start a run from a plain view, a command or a task; see start_run().

    It goes on in the event loop that serves the view, else in a thread of this process,
    and ends with the process. Raises BlockingCall in async code.
    """
    start = partial(start_run, agent, message, session_id=session_id, user=user)
    return _start_sync(partial(start, **options))


def answer_run_sync(
    agent: Agent[Any],
    approved: bool | Mapping[str, bool],
    *,
    session_id: str,
    user: AbstractBaseUser | None = None,
    **options: Any,
) -> SyncRun:
    """Answer approvals from a plain view, a command or a task; see answer_run()."""
    answer = partial(answer_run, agent, approved, session_id=session_id, user=user)
    return _start_sync(partial(answer, **options))


def _start_sync(start: Callable[[], Coroutine[Any, Any, Run]]) -> SyncRun:
    """Start a run in the loop that serves the view, or in the process's own."""
    if (loop := waiting_loop()) is not None:
        return SyncRun(loop, _wait(loop, start))
    with _background.used() as loop:
        run = _wait(loop, start)
        made = SyncRun(loop, run)
        _background.keep(made, run)
    return made


def _wait(
    loop: asyncio.AbstractEventLoop,
    function: Callable[..., Coroutine[Any, Any, T]],
    *args: Any,
) -> T:
    """Call a coroutine function in a loop of another thread, and wait for its result."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        raise BlockingCall("start_run_sync()", "start_run()")

    async def call() -> T:
        return await function(*args)

    if loop is waiting_loop():
        # What needs the thread that waits here gets it.
        return async_to_sync(call)()
    begin = partial(asyncio.run_coroutine_threadsafe, call(), loop)
    return without_caller().run(begin).result()


class _Background:
    """The event loop of a process that has no other.

    Its thread, and the connections that it has, end with the last run that goes on and
    the last SyncRun that somebody holds.
    """

    def __init__(self) -> None:
        self._lock = new_lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._users = self._pid = 0

    @contextmanager
    def used(self) -> Iterator[asyncio.AbstractEventLoop]:
        """Keep the loop while the block runs; a forked child makes one of its own."""
        with self._lock:
            if self._loop is None or self._pid != os.getpid():
                self._loop, self._pid = asyncio.new_event_loop(), os.getpid()
                self._users = 0
                threading.Thread(
                    target=serve,
                    args=[self._loop],
                    name="agent_sessions-runs",
                    daemon=True,
                ).start()
            self._users += 1
            loop = self._loop
        try:
            yield loop
        finally:
            self._leave(loop)

    def keep(self, made: SyncRun, run: Run) -> None:
        """Keep the loop until a run has ended and nobody holds its synchronous form."""
        with self._lock:
            self._users += 1
            loop = self._loop

        async def leave() -> None:
            await run.ended()
            self._leave(loop)

        def gone() -> None:
            # Called wherever garbage is collected, also while the lock is held.
            if loop is not None and not loop.is_closed():
                loop.call_soon_threadsafe(
                    lambda: tasks.append(loop.create_task(leave()))
                )

        tasks: list[asyncio.Task[None]] = []
        finalize(made, gone).atexit = False

    def _leave(self, loop: asyncio.AbstractEventLoop | None) -> None:
        with self._lock:
            if loop is None or loop is not self._loop:
                return
            self._users -= 1
            if not self._users:
                self._loop = None
                loop.call_soon_threadsafe(loop.stop)


_background = _Background()
