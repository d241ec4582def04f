"""Runs that workers do, by way of Django's Tasks framework."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import django
from asgiref.sync import async_to_sync, sync_to_async
from django.contrib.auth import get_user_model
from django.db import close_old_connections
from django.utils.module_loading import import_string

from agent_sessions.agui import RunRequest, StreamOptions
from agent_sessions.backends import run_rows
from agent_sessions.backends.run_rows import Status
from agent_sessions.concurrency.settle import settle
from agent_sessions.exceptions import EncryptionError, SessionDoesNotExist, extra
from agent_sessions.handler import sessions
from agent_sessions.runs import queued
from agent_sessions.runs.active import ActiveRun
from agent_sessions.runs.failures import log_failure, refusal_code
from agent_sessions.runs.manager import get_run_manager
from agent_sessions.runs.setup import Conversation, RunLimits
from agent_sessions.usage import model_of

if TYPE_CHECKING or django.VERSION >= (6, 0):
    from django.tasks import task
else:
    with extra("tasks", "django_tasks", needed_by=__name__):
        from django_tasks import task

logger = logging.getLogger("agent_sessions.runs")


@dataclass(frozen=True, slots=True)
class Door:
    """What a worker makes the door of a run from, which has come in elsewhere."""

    # The dotted path of a class, and what it is given.
    path: str
    options: dict[str, Any]
    # The priority, queue_name and backend of tasks.
    task_options: dict[str, Any] = field(default_factory=dict)


async def enqueue(
    conversation: Conversation,
    request: RunRequest,
    door: Door,
    limits: RunLimits,
    options: StreamOptions,
) -> bool:
    """Queue a run for a worker; return False if its id was used before.

    Raise what RunManager.start() does. A run that no queue takes has failed.
    """
    put = queued.put, conversation, request, limits, options
    return await settle(_enqueue(conversation, request.run_id, door, put))


async def _enqueue(
    conversation: Conversation, run_id: str, door: Door, put: tuple[Any, ...]
) -> bool:
    threads = conversation.backend.threads
    if not await threads.run(*put):
        return False
    get_run_manager().nudge(conversation, run_id)
    owner = str(conversation.key.user_id)
    place = [conversation.backend.alias, conversation.session_id, owner]

    def send() -> None:
        close_old_connections()
        run_queued.using(**door.task_options).enqueue(
            door.path, door.options, place, run_id
        )

    try:
        # After the commit: a worker that is quick finds the rows.
        await sync_to_async(send)()
    except Exception as exc:
        log_failure(run_id, "internal", exc)
        await threads.run(
            queued.cancel, conversation, run_id, Status.FAILED, "internal"
        )
    return True


@task()
def run_queued(
    path: str, options: dict[str, Any], place: list[str], run_id: str
) -> None:
    """Do a run that was queued, once, however often the task is delivered."""
    door = import_string(path)(**options)
    async_to_sync(_work)(door, place, run_id)


async def _work(door: Any, place: list[str], run_id: str) -> None:
    alias, session_id, owner = place
    threads = sessions[alias].threads
    user = await threads.run(get_user_model()._default_manager.filter(pk=owner).first)
    try:
        conversation = await Conversation.find(
            session_id, user=cast("Any", user), backend=alias
        )
        taken = await threads.run(queued.take, conversation, run_id)
    except (SessionDoesNotExist, EncryptionError) as exc:
        logger.warning(
            "Queued run %r can't be done (%s)",
            run_id,
            type(exc).__name__,
            extra={"run_id": run_id, "error_type": type(exc).__name__},
        )
        return
    if taken is None:
        return
    setup, code = None, "forbidden"
    try:
        if user is not None and user.is_active:
            # People are disabled, and lose permissions, while a run is queued.
            setup = await door.setup_for(user, conversation)
    except Exception as exc:
        code = refusal_code(exc) or "internal"
        log_failure(run_id, code, exc)
    if setup is None:
        end = conversation, taken.lease, Status.FAILED, code
        await threads.run(queued.finish, *end)
        return
    model = model_of(setup.agent, setup.run_config)
    await threads.run(_write_model, conversation, taken.lease.run.pk, model)
    manager = get_run_manager()
    run = ActiveRun(conversation, taken.request, setup, taken.lease, manager.tell)
    # Its start is told.
    run.rows.number = run.rows.written = 1
    run.waiting = taken.waiting
    manager.begin(run)
    if run.task is not None:
        await asyncio.wait({run.task})


def _write_model(conversation: Conversation, run: int, model: str) -> None:
    run_rows.write(conversation.runs().filter(pk=run), model=model)
