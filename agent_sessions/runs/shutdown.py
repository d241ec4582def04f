"""Stop runs when the server of a process is told to end."""

from __future__ import annotations

import asyncio
import signal
import threading
from typing import Any

from agent_sessions.runs.manager import get_run_manager


def with_shutdown(application: Any) -> Any:
    """Wrap an ASGI application, so that its runs end well when its server is stopped.

    `application = with_shutdown(ProtocolTypeRouter({...}))`. On SIGTERM, runs stop after
    their turn within `RunLimits.grace`, else at once; then sockets are closed.
    """
    ending = _Ending()

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            ending.listen(has_lifespan=False)
            await application(scope, receive, send)
            return
        await receive()
        ending.listen(has_lifespan=True)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await ending.begin()
        await send({"type": "lifespan.shutdown.complete"})

    return serve


class _Ending:
    """The end of a process, of which SIGTERM tells, and the lifespan where there is one.

    A server with a lifespan waits for the runs there, but first for all its requests:
    the signal stops the runs that these listen to. Another server, as daphne, hears of
    the signal only when the runs have ended.
    """

    def __init__(self) -> None:
        self._is_listening = False
        self._task: asyncio.Task[None] | None = None

    def listen(self, *, has_lifespan: bool) -> None:
        """Handle SIGTERM from now on, and pass it on to the server."""
        if self._is_listening:
            return
        self._is_listening = True
        if threading.current_thread() is not threading.main_thread():
            # Only there may handlers be set.
            return
        loop, previous = asyncio.get_running_loop(), signal.getsignal(signal.SIGTERM)
        has_come = False

        def handle(number: int, frame: Any) -> None:
            nonlocal has_come
            if has_lifespan or has_come:
                # Who sends it twice won't wait.
                pass_on()
            has_come = True
            loop.call_soon_threadsafe(begin)

        def begin() -> None:
            task = self.begin()
            if not has_lifespan:
                task.add_done_callback(lambda task: pass_on())

        def pass_on() -> None:
            if callable(previous):
                previous(signal.SIGTERM, None)
            elif previous == signal.SIG_DFL:
                signal.signal(signal.SIGTERM, previous)
                signal.raise_signal(signal.SIGTERM)

        signal.signal(signal.SIGTERM, handle)

    def begin(self) -> asyncio.Task[None]:
        """Stop the runs of the running loop, once."""
        if self._task is None:
            self._task = asyncio.create_task(get_run_manager().shutdown())
        return self._task
