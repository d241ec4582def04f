"""The base of all cases: hooks, the loop they run in, and agents with a script."""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import pytest
from agents import Agent, Runner, RunResult, RunResultStreaming, Tool, function_tool
from agents.memory import Session
from agents.testing import ScriptedModel, assistant_message, function_call
from asgiref.sync import async_to_sync

T = TypeVar("T")
Item = dict[str, Any]
Case = Callable[..., Any]
TestFunction = TypeVar("TestFunction", bound=Case)


def needs(*features: str) -> Callable[[TestFunction], TestFunction]:
    """Collect a case only where the class sets `supports_<feature>` for each."""

    def mark(test: TestFunction) -> TestFunction:
        test.__dict__["contract_needs"] = features
        return test

    return mark


def each(values: Mapping[str, Any]) -> Callable[[TestFunction], TestFunction]:
    """Run a case once for each value of its argument, under the value's name."""

    def mark(test: TestFunction) -> TestFunction:
        argument = list(inspect.signature(test).parameters)[1]
        parametrize = pytest.mark.parametrize(argument, values.values(), ids=values)
        return parametrize(test)

    return mark


class ContractBase:
    """The hooks that a store's author fills, and the helpers of the cases."""

    supports_corrupt: ClassVar[bool] = False
    """`corrupt` damages a stored item."""
    supports_owner: ClassVar[bool] = False
    """`make_session` takes `user`, and `make_user` makes one."""
    supports_wrapper: ClassVar[bool] = False
    """The four methods take the run context as `wrapper`."""
    supports_clear_alias: ClassVar[bool] = False
    """`clear` does what `clear_session` does."""
    supports_reopen: ClassVar[bool] = True
    """A second `make_session` with the same id opens the same history."""
    supports_threads: ClassVar[bool] = True
    """Sessions may be used from loops in several threads at once."""
    supports_encryption: ClassVar[bool] = True
    """The SDK's EncryptedSession (which needs cryptography) can wrap a session."""

    known_gaps: ClassVar[Mapping[str, str]] = {}
    """Cases the store is known to fail, with the reason. They must go on failing."""

    foreign_error: ClassVar[type[Exception]] = LookupError
    """Raised where a session is someone else's."""

    timeout: ClassVar[float] = 60
    """Seconds after which a case that hangs is failed."""
    examples: ClassVar[int] = 25
    """How many examples hypothesis makes for each of its cases."""

    async def make_session(self, session_id: str, **options: Any) -> Session:
        """Open the session of this id.

        Options are `session_settings` (a SessionSettings or a dict) and, where
        owners are supported, `user`.
        """
        raise NotImplementedError

    async def make_user(self, name: str) -> Any:
        """Make a user who can own sessions."""
        raise NotImplementedError

    async def corrupt(self, session: Session, nth: int, data: str) -> str:
        """Replace what is stored of the nth item by `data`, and return the old text.

        Negative numbers count from the newest. Damaged rows count as well.
        """
        raise NotImplementedError

    def run_coroutine(self, main: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine function in a new event loop; override to choose how."""

        async def entry() -> T:
            return await main()

        return async_to_sync(entry)()

    def new_id(self) -> str:
        return f"contract-{uuid.uuid4()}"

    async def open(self, session_id: str | None = None, **options: Any) -> Any:
        """Open a session, with an id of its own if none is given."""
        return await self.make_session(session_id or self.new_id(), **options)

    async def filled(self, count: int, **options: Any) -> Any:
        """Open a new session with `count` messages, told apart by their number."""
        session = await self.open(**options)
        await session.add_items(messages(count))
        return session

    @pytest.fixture(params=["run", "run_streamed"])
    def run(self, request: pytest.FixtureRequest) -> Run:
        """Return a way to run an agent; a case that asks for it runs once with each."""
        return RUNS[request.param]

    @pytest.fixture(autouse=True)
    def _known_gap(self, request: pytest.FixtureRequest) -> None:
        if reason := self.known_gaps.get(request.node.name):
            request.applymarker(pytest.mark.xfail(strict=True, reason=reason))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, test in list(vars(cls).items()):
            if name.startswith("test") and inspect.iscoroutinefunction(test):
                setattr(cls, name, _as_test(test))
        inherited = set(dir(cls)) - vars(cls).keys()
        for name in filter(lambda name: name.startswith("test"), inherited):
            found = (vars(kind).get(name) for kind in cls.__mro__)
            test = next(filter(None, found), None)
            if features := getattr(test, "contract_needs", ()):
                is_supported = all(getattr(cls, f"supports_{f}") for f in features)
                setattr(cls, name, test if is_supported else None)


def _as_test(test: Case) -> Case:
    """Make a coroutine function one that pytest calls without a plugin."""

    @functools.wraps(test)
    def run_test(self: ContractBase, *args: Any, **kwargs: Any) -> None:
        async def main() -> None:
            async with asyncio.timeout(self.timeout):
                await test(self, *args, **kwargs)

        self.run_coroutine(main)

    # pytest looks through __wrapped__ and would take this for a coroutine function;
    # the signature stays, for fixtures.
    run_test.__dict__["__signature__"] = inspect.signature(test)
    del run_test.__dict__["__wrapped__"]
    return run_test


def message(text: str) -> Item:
    return {"role": "user", "content": text}


def messages(count: int, prefix: str = "item") -> list[Item]:
    return [message(f"{prefix} {number}") for number in range(count)]


def texts(items: Sequence[Any]) -> list[Any]:
    """Return the contents of messages."""
    return [item["content"] for item in items]


def assert_same(found: Any, expected: Any) -> None:
    """Assert equality of items, as the SDK compares them when it resumes.

    1, 1.0 and true differ. The way through JSON joins surrogate pairs, which no JSON
    text can tell from the character that they stand for.
    """
    pair = [json.loads(json.dumps(value)) for value in (found, expected)]
    found, expected = [json.dumps(value, sort_keys=True) for value in pair]
    assert found == expected


Result = RunResult | RunResultStreaming
Run = Callable[..., Awaitable[Result]]


async def run_streamed(agent: Agent[Any], given: Any, **options: Any) -> Result:
    result = Runner.run_streamed(agent, given, **options)
    async for _ in result.stream_events():
        pass
    return result


RUNS: dict[str, Run] = {"run": Runner.run, "run_streamed": run_streamed}


def say(text: str) -> list[Any]:
    """One model step: an answer."""
    return [assistant_message(text, item_id=f"msg_{text}")]


def call(name: str, call_id: str, /, **arguments: Any) -> Any:
    """One call of a tool, as part of a model step."""
    return function_call(name, arguments, call_id=call_id, item_id=f"fc_{call_id}")


def scripted(
    steps: Sequence[Any], *, tools: Sequence[Tool] = (), **options: Any
) -> tuple[Agent[Any], ScriptedModel]:
    """Make an agent whose model gives these steps."""
    model = ScriptedModel(steps)
    name = options.pop("name", "scripted")
    return Agent(name=name, model=model, tools=list(tools), **options), model


@function_tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def outline(items: Sequence[Any]) -> list[str]:
    """Return in short what each stored item is: 'user hi', 'call c1', ..."""
    lines = []
    for item in items:
        kind = item.get("type", "message")
        if kind == "function_call":
            lines.append(f"call {item['call_id']}")
        elif kind == "function_call_output":
            lines.append(f"output {item['call_id']} {item['output']}")
        elif kind == "message":
            content = item["content"]
            text = content if isinstance(content, str) else content[0]["text"]
            lines.append(f"{item['role']} {text}")
        else:
            lines.append(kind)
    return lines
