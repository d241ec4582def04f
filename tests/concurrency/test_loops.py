"""Clients that belong to one event loop, and the loop for callers who have none."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import textwrap
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
from asgiref.sync import async_to_sync

from agent_sessions.concurrency.loops import BackgroundLoop, PerLoop, with_caller
from agent_sessions.exceptions import StoreUnavailable


class Client:
    """Belongs to the loop in which it was made, as the clients of stores do."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.closed = False

    async def close(self) -> None:
        assert asyncio.get_running_loop() is self.loop
        await asyncio.sleep(0)
        self.closed = True


class Maker:
    """Counts the clients it makes; fails as often as it is told to."""

    def __init__(self, failures: int = 0) -> None:
        self.made = 0
        self.failures = failures

    async def __call__(self) -> Client:
        await asyncio.sleep(0)
        if self.failures:
            self.failures -= 1
            raise OSError("no server")
        self.made += 1
        return Client()


def test_each_loop_has_its_client_and_closes_it() -> None:
    """redis-py, dapr, openai: a second asyncio.run() says "Event loop is closed"."""
    make = Maker()
    clients = PerLoop(make, Client.close)

    async def use() -> Client:
        first, *others = await asyncio.gather(*(clients.get() for _ in range(5)))
        assert others == [first] * 4
        assert not first.closed
        return first

    first, second = asyncio.run(use()), asyncio.run(use())
    assert first is not second
    assert first.closed
    assert second.closed
    assert make.made == 2


def test_nothing_of_a_loop_is_kept_when_it_is_over() -> None:
    clients = PerLoop(Maker(), Client.close)

    async def use() -> tuple[weakref.ref[object], weakref.ref[object]]:
        client = await clients.get()
        return weakref.ref(client), weakref.ref(client.loop)

    kept = [asyncio.run(use()) for _ in range(3)]
    gc.collect()
    assert [each() for pair in kept for each in pair] == [None] * 6


def test_a_loop_that_was_closed_without_a_word_is_let_go_of() -> None:
    clients = PerLoop(Maker(), Client.close)
    loop = asyncio.new_event_loop()
    client = loop.run_until_complete(clients.get())
    loop.set_exception_handler(lambda loop, context: None)
    # Nobody closed its generators.
    loop.close()
    assert not client.closed

    async def use() -> Client:
        return await clients.get()

    assert asyncio.run(use()).closed
    assert loop not in clients._keepers


def test_a_client_is_closed_that_is_let_go_of_as_its_loop_ends() -> None:
    """Settings that change drop a backend; nobody else holds what it has opened."""

    async def use() -> Client:
        clients = PerLoop(Maker(), Client.close)
        client = await clients.get()
        del clients
        gc.collect()
        return client

    assert async_to_sync(use)().closed
    assert asyncio.run(use()).closed


def test_a_client_that_could_not_be_made_is_made_at_the_next_use() -> None:
    clients = PerLoop(Maker(failures=1), Client.close)

    async def use() -> Client:
        with pytest.raises(OSError, match="no server"):
            await clients.get()
        return await clients.get()

    assert asyncio.run(use()).closed


def test_a_client_that_was_closed_is_made_anew() -> None:
    clients = PerLoop(Maker(), Client.close)

    async def use() -> None:
        first = await clients.get()
        await clients.aclose()
        assert first.closed
        assert await clients.get() is not first
        await clients.aclose()
        await clients.aclose()

    asyncio.run(use())


# -- the loop of synchronous callers ---------------------------------------------------


async def loop_of() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


def test_synchronous_callers_share_a_loop_until_it_is_closed() -> None:
    background = BackgroundLoop("test-loop")
    with ThreadPoolExecutor(4) as threads:
        loops = set(threads.map(lambda _: background.run(loop_of()), range(20)))
    assert len(loops) == 1
    background.close()
    background.close()
    assert loops.pop().is_closed()
    assert not [t for t in threading.enumerate() if t.name == "test-loop"]
    assert not background.run(loop_of()).is_closed()
    background.close()


def test_its_clients_are_closed_with_it() -> None:
    background = BackgroundLoop("test-loop")
    clients = PerLoop(Maker(), Client.close)
    client = background.run(clients.get())
    assert background.run(clients.get()) is client
    background.close()
    assert client.closed


def test_who_waits_is_told_that_it_was_closed() -> None:
    background = BackgroundLoop("test-loop")
    begun = threading.Event()

    async def hang() -> None:
        begun.set()
        await asyncio.Event().wait()

    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(background.run, hang())
        assert begun.wait(5)
        background.close()
        with pytest.raises(StoreUnavailable, match="closed while it was used"):
            waiting.result(5)


def test_errors_come_back_to_the_caller() -> None:
    background = BackgroundLoop("test-loop")

    async def fail() -> None:
        raise LookupError("nothing there")

    async def ask_oneself() -> None:
        background.run(loop_of())

    with pytest.raises(LookupError, match="nothing there"):
        background.run(fail())
    with pytest.raises(RuntimeError, match="must not call its sync face"):
        background.run(ask_oneself())
    background.close()


async def test_a_caller_in_another_loop_gets_the_result() -> None:
    background = BackgroundLoop("test-loop")
    own = await background.arun(loop_of())
    assert own is not asyncio.get_running_loop()

    async def within() -> asyncio.AbstractEventLoop:
        return await background.arun(loop_of())

    assert await background.arun(within()) is own
    # No thread waits, so nobody could do an errand.
    assert await background.arun(with_caller(lambda: 1)) == (False, None)
    background.close()


FORK = """
    import asyncio, os, sys, threading
    from agent_sessions.concurrency.loops import BackgroundLoop, PerLoop

    async def make():
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        return reader, writer

    async def close(client):
        client[1].close()

    async def say(text):
        reader, writer = await clients.get()
        writer.write(text.encode() + b"\\n")
        return (await reader.readline()).decode().strip()

    def echo(server):
        while True:
            peer, _ = server.accept()
            threading.Thread(target=answer, args=[peer], daemon=True).start()

    def answer(peer):
        with peer, peer.makefile("rwb") as file:
            for line in file:
                file.write(line)
                file.flush()

    import socket
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    threading.Thread(target=echo, args=[server], daemon=True).start()
    clients = PerLoop(make, close)
    background = BackgroundLoop("fork")
    assert background.run(say("parent")) == "parent"
    pid = os.fork()
    if pid == 0:
        import gc
        gc.collect()
        assert background.run(say("child")) == "child"
        background.close()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert background.run(say("parent again")) == "parent again"
    background.close()
    print("done")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_a_fork_has_a_loop_and_clients_of_its_own() -> None:
    """Preloaded workers: the child must not touch what the parent listens with."""
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FORK)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (run.stdout.strip(), run.returncode) == ("done", 0), run.stderr
