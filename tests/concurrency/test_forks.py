"""Forks of a process that uses a store: `gunicorn --preload`, prefork workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.servers.conversations import KEY, conversations_server
from tests.servers.dapr import STORE, DaprSidecar
from tests.servers.process import Server
from tests.servers.redis import url

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork"),
]

# The forked children use what their parent has used before, sync and async, and beside
# a thread of it that goes on; then the parent does.
SOURCE = """
import asyncio, faulthandler, gc, json, os, signal, sys, threading, time
import django
# Whoever hangs says where.
faulthandler.register(signal.SIGALRM, all_threads=True, chain=True)
from django.conf import settings
django.setup()
settings.AGENT_SESSIONS = json.loads(sys.argv[1])
from django.db import connections
from agent_sessions import get_session, sessions
sessions.reset()
CHILDREN = int(sys.argv[2])

def said(text):
    return [{"role": "user", "content": text}]

def text_of(item):
    content = item["content"]
    return content if isinstance(content, str) else content[0]["text"]

def use(name):
    session = get_session(name)
    session.sync.add_items(said("one"))
    asyncio.run(session.add_items(said("two")))
    assert [text_of(i) for i in session.sync.get_items()] == ["one", "two"]
    assert text_of(asyncio.run(session.pop_item())) == "two"

def after(name):
    assert [text_of(i) for i in get_session(name).sync.get_items()] == ["one"], name

def fork(work):
    # As servers that fork do: no connection of the parent's is used by two.
    connections.close_all()
    child = os.fork()
    if not child:
        signal.alarm(120)
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            # Nothing that a child lets go of may end what its parent uses.
            gc.collect()
            os._exit(status)
    return child

def ended(child):
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0, code

def nested(name):
    use(name)
    ended(fork(lambda: use(name + "-nested")))
    use(name + "-after")

signal.alarm(220)
use("parent")
stop, busy = threading.Event(), []

def work_on():
    session = get_session("busy")
    while not stop.is_set():
        session.sync.add_items(said(str(len(busy))))
        busy.append(len(busy))
        time.sleep(0.02)

def work_on_async():
    async def main():
        session = get_session("busy-async")
        while not stop.is_set():
            await session.add_items(said("x"))
            await asyncio.sleep(0.02)
    asyncio.run(main())

errors = []
def watched(work):
    try:
        work()
    except BaseException as exc:
        errors.append(repr(exc))

# SQLite itself can't fork while a thread's own connection is in a transaction.
jobs = [work_on_async, work_on][: 1 if connections["default"].vendor == "sqlite" else 2]
threads = [threading.Thread(target=watched, args=[j], daemon=True) for j in jobs]
for thread in threads:
    thread.start()
time.sleep(0.5)
children = []
for number in range(CHILDREN):
    children.append(fork(lambda: nested(f"child-{number}")))
    use(f"parent-{number}")
for child in children:
    ended(child)
stop.set()
for thread in threads:
    thread.join()
assert not errors, errors
connections.close_all()
# In a coroutine, too.
async def forks():
    session = get_session("loop")
    await session.add_items(said("one"))
    child = fork(lambda: use("of-a-loop"))
    await asyncio.to_thread(ended, child)
    assert len(await session.get_items()) == 1
os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"] = "true"
asyncio.run(forks())
after("parent")
for number in range(CHILDREN):
    for name in ("child-{}", "child-{}-nested", "child-{}-after", "parent-{}"):
        after(name.format(number))
found = [text_of(i) for i in get_session("busy").sync.get_items()]
assert found == [str(n) for n in busy], (len(found), len(busy))
sessions.reset()
print("done")
"""


def run(alias: dict[str, Any], environment: dict[str, str], children: int = 3) -> None:
    done = subprocess.run(
        # Python 3.12 and later warn of every fork beside threads, which is the point.
        [
            *(sys.executable, "-W", "ignore::DeprecationWarning", "-c", SOURCE),
            *(json.dumps(alias), str(children)),
        ],
        env=environment | {"OPENAI_AGENTS_DISABLE_TRACING": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (done.stdout.strip(), done.returncode) == ("done", 0), done.stderr[-6000:]


def backend(path: str, **options: Any) -> dict[str, Any]:
    return {"BACKEND": f"agent_sessions.backends.{path}", "OPTIONS": options}


# Of the sidecar, which shares a busy machine with the children.
PATIENT = {"DAPR_HEALTH_TIMEOUT": "30"}
DAPR = backend("dapr.DaprBackend", store_name=STORE)
SECRET = "fork" * 8


def test_the_database(database_environment: dict[str, str]) -> None:
    run({"default": backend("database.DatabaseBackend")}, database_environment)


def test_an_encrypted_database(database_environment: dict[str, str]) -> None:
    inner = backend("database.DatabaseBackend")
    outer = backend("encrypted.EncryptedBackend", backend="inner", keys=[SECRET])
    run({"default": outer, "inner": inner}, database_environment)


@pytest.mark.one_database
@pytest.mark.parametrize("attempt", range(2))
def test_dapr(
    dapr_server: DaprSidecar, database_environment: dict[str, str], attempt: int
) -> None:
    run({"default": DAPR}, database_environment | dapr_server.environment | PATIENT)


@pytest.mark.one_database
def test_an_encrypted_dapr(
    dapr_server: DaprSidecar, database_environment: dict[str, str]
) -> None:
    outer = backend("encrypted.EncryptedBackend", backend="inner", keys=[SECRET])
    environment = database_environment | dapr_server.environment | PATIENT
    run({"default": outer, "inner": DAPR}, environment)


@pytest.mark.one_database
def test_redis(redis_server: Server, database_environment: dict[str, str]) -> None:
    alias = backend("redis.RedisBackend", url=url(redis_server), key_prefix="forks")
    run({"default": alias}, database_environment)


@pytest.fixture
def openai() -> Iterator[dict[str, Any]]:
    with conversations_server() as server:
        yield backend(
            "openai.OpenAIConversationsBackend", base_url=server.url, api_key=KEY
        )


@pytest.mark.one_database
def test_openai(openai: dict[str, Any], database_environment: dict[str, str]) -> None:
    run({"default": openai}, database_environment)


@pytest.mark.one_database
@pytest.mark.parametrize("session", ["SQLiteSession", "AsyncSQLiteSession"])
def test_classes_of_the_sdk(
    session: str, tmp_path: Path, database_environment: dict[str, str]
) -> None:
    path = f"agents.{session}"
    if session == "AsyncSQLiteSession":
        path = f"agents.extensions.memory.{session}"
    alias = backend(
        "sdk.SDKBackend", session=path, db_path=str(tmp_path / "sessions.db")
    )
    run({"default": alias}, database_environment, 2)


# Where its own thread is the loop's, a fork has nothing to wait for.
IN_A_CALL = """
import asyncio, os, signal
from agent_sessions.concurrency.loops import BackgroundLoop, PerLoop, with_caller

background = BackgroundLoop("fork")

def fork():
    child = os.fork()
    if not child:
        signal.alarm(20)
        async def answer():
            return "child"
        os._exit(0 if background.run(answer()) == "child" else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

async def in_its_thread():
    return fork()

async def in_its_caller():
    return (await with_caller(fork))[1]

signal.alarm(25)
assert background.run(in_its_thread()) == 0
assert background.run(in_its_caller()) == 0
background.close()
print("done")
"""


# What is held while a client is made, as by gRPC, would be held in the child for ever.
WHILE_ONE_IS_MADE = """
import asyncio, os, signal, threading, time
from agent_sessions.concurrency.loops import PerLoop

held, lock, stop = threading.Event(), threading.Lock(), threading.Event()

async def make():
    with lock:
        held.set()
        time.sleep(0.5)
    return object()

async def leave(client):
    pass

async def main():
    await clients.get()
    while not stop.is_set():
        await asyncio.sleep(0.01)

signal.alarm(25)
clients = PerLoop(make, leave, put_away=leave)
thread = threading.Thread(target=asyncio.run, args=[main()])
thread.start()
held.wait()
child = os.fork()
if not child:
    os._exit(0 if lock.acquire(timeout=5) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
stop.set()
thread.join()
print("done")
"""


@pytest.mark.one_database
@pytest.mark.parametrize(
    "source", [IN_A_CALL, WHILE_ONE_IS_MADE], ids=["in_a_call", "while_one_is_made"]
)
def test_a_fork_beside_a_loop(source: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", source],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout.strip(), done.returncode) == ("done", 0), done.stderr
