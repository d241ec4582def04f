"""A site of two tenants, each of which the project keeps apart in one of four ways.

Its middleware knows the tenant from a header, and sets it where the way looks for it: on
the connection, in a context variable and in the thread.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from agents import Agent, Runner
from agents.testing import ScriptedModel, assistant_message
from asgiref.sync import ThreadSensitiveContext, async_to_sync, sync_to_async
from django.db import connections
from django.http import HttpRequest, JsonResponse
from django.urls import path
from django.utils.decorators import sync_and_async_middleware

from agent_sessions import get_session
from tests.settings import DATABASE_KIND

TENANTS = ("one", "two")
current: ContextVar[str] = ContextVar("current", default="")
in_thread = threading.local()
# Where both requests wait for each other; None where they come one by one.
meeting: threading.Barrier | None = None

Setting = Callable[[Any, str], None]


def set_schema(connection: Any, tenant: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(f"SET search_path TO {tenant or 'nobody'}, public")


def set_row_security(connection: Any, tenant: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SET ROLE tenant_role")
        cursor.execute("SELECT set_config('app.tenant', %s, false)", [tenant])


def set_nothing(connection: Any, tenant: str) -> None:
    """Leave it to the router."""


class ByContext:
    """Choose the database of the tenant that a context variable names."""

    def db_for_read(self, model: Any, **hints: Any) -> str:
        return self.tenant() or "default"

    db_for_write = db_for_read

    def allow_relation(self, one: Any, other: Any, **hints: Any) -> bool:
        return True

    def tenant(self) -> str:
        return current.get()


class ByThread(ByContext):
    """Choose the database of the tenant that the running thread serves."""

    def tenant(self) -> str:
        return getattr(in_thread, "tenant", "")


# What the middleware sets on the connection.
setting: Setting = set_nothing


def prepare(connection: Any) -> None:
    """Set on a connection what the middleware sets: OPTIONS["prepare_connection"]."""
    setting(connection, current.get())


def enter(tenant: str) -> None:
    """Do in the request's thread what a tenant's middleware does."""
    in_thread.tenant = tenant
    setting(connections["default"], tenant)


def leave() -> None:
    in_thread.tenant = ""
    if DATABASE_KIND == "postgres":
        with connections["default"].cursor() as cursor:
            cursor.execute("RESET ROLE; RESET search_path; RESET app.tenant")


@contextmanager
def tenant_of(name: str) -> Iterator[None]:
    token = current.set(name)
    enter(name)
    try:
        yield
    finally:
        leave()
        current.reset(token)


@sync_and_async_middleware
def by_header(get_response: Any) -> Any:
    """Serve each request for the tenant that its header names."""
    if asyncio.iscoroutinefunction(get_response):

        async def serve(request: HttpRequest) -> Any:
            tenant = request.headers["X-Tenant"]
            current.set(tenant)
            await sync_to_async(enter)(tenant)
            try:
                return await get_response(request)
            finally:
                await sync_to_async(leave)()

        return serve

    def serve_synchronously(request: HttpRequest) -> Any:
        with tenant_of(request.headers["X-Tenant"]):
            return get_response(request)

    return serve_synchronously


def by_path(application: Any) -> Any:
    """Serve each websocket for the tenant that its scope names, in a thread of its own."""

    async def serve(scope: Any, receive: Any, send: Any) -> Any:
        current.set(scope["tenant"])
        async with ThreadSensitiveContext():
            await sync_to_async(enter)(scope["tenant"])
            try:
                return await application(scope, receive, send)
            finally:
                await sync_to_async(close)()

    return serve


def close() -> None:
    leave()
    connections.close_all()


def meet() -> None:
    if meeting is not None:
        meeting.wait(20)


def said(request: HttpRequest) -> Any:
    return [{"role": "user", "content": f"{request.headers['X-Tenant']} says"}]


def answer(items: list[Any]) -> JsonResponse:
    return JsonResponse([item["content"] for item in items], safe=False)


def synchronous(request: HttpRequest, session_id: str) -> JsonResponse:
    session: Any = get_session(session_id).sync
    session.add_items(said(request))
    meet()
    return answer(session.get_items())


async def asynchronous(request: HttpRequest, session_id: str) -> JsonResponse:
    session = get_session(session_id)
    await session.add_items(said(request))
    await asyncio.to_thread(meet)
    return answer(await session.get_items())


def bridged(request: HttpRequest, session_id: str) -> JsonResponse:
    """Call coroutines from a synchronous view."""
    session = get_session(session_id)
    async_to_sync(session.add_items)(said(request))
    meet()
    return answer(async_to_sync(session.get_items)())


def running(request: HttpRequest, session_id: str) -> JsonResponse:
    """Run an agent in a loop of this thread."""
    session = get_session(session_id)
    agent = Agent(name="Clerk", model=ScriptedModel([[assistant_message("Yes.")]]))
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        meet()
        Runner.run_sync(agent, said(request)[0]["content"], session=session)
        meet()
        items: Any = loop.run_until_complete(session.get_items())
    finally:
        asyncio.set_event_loop(None)
        loop.close()
    return answer(items[:1])


urlpatterns = [
    path("synchronous/<str:session_id>", synchronous),
    path("asynchronous/<str:session_id>", asynchronous),
    path("bridged/<str:session_id>", bridged),
    path("running/<str:session_id>", running),
]
