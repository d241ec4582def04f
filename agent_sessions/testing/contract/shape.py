"""What a session looks like to the Runner: attributes, signatures, event loops."""

from __future__ import annotations

import asyncio
import functools
import inspect
from typing import Any

from agents import RunContextWrapper
from agents.memory import Session, SessionABC, SessionSettings
from agents.memory import session as sdk_session

from agent_sessions.testing.contract.base import (
    ContractBase,
    assert_same,
    each,
    message,
    messages,
    needs,
    texts,
)

METHODS = ("get_items", "add_items", "pop_item", "clear_session")
LOOP_BOUND = (
    asyncio.Lock,
    asyncio.Event,
    asyncio.Condition,
    asyncio.Semaphore,
    asyncio.Queue,
    asyncio.Future,
    asyncio.AbstractEventLoop,
)


class ShapeCases(ContractBase):
    async def test_satisfies_the_protocol(self) -> None:
        """`isinstance(session, Session)` holds."""
        assert isinstance(await self.open(), Session)

    async def test_is_a_session_abc(self) -> None:
        """Sessions of this project are subclasses of SessionABC."""
        assert isinstance(await self.open(), SessionABC)

    async def test_session_id_is_readable_at_once(self) -> None:
        """The id is the one given, before anything was stored."""
        session_id = self.new_id()
        session = await self.open(session_id)
        assert session.session_id == session_id

    @each({name: name for name in METHODS})
    async def test_is_a_coroutine_function(self, name: str) -> None:
        """The four methods are coroutine functions."""
        assert inspect.iscoroutinefunction(getattr(await self.open(), name))

    async def test_get_items_names_its_parameter_limit(self) -> None:
        """The Runner passes `limit` by keyword, and it may be left out."""
        parameter = inspect.signature((await self.open()).get_items).parameters["limit"]
        assert parameter.default is None
        assert parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD

    async def test_limit_by_keyword_and_by_position(self) -> None:
        """The Runner passes `limit` by keyword, EncryptedSession by position."""
        session = await self.filled(3)
        assert texts(await session.get_items(limit=2)) == ["item 1", "item 2"]
        assert texts(await session.get_items(2)) == ["item 1", "item 2"]

    async def test_arguments_by_keyword(self) -> None:
        """Items may be given by name."""
        session = await self.open()
        await session.add_items(items=messages(1))
        assert texts(await session.get_items()) == ["item 0"]

    async def test_settings_default(self) -> None:
        """Without settings there is either None or settings that limit nothing."""
        settings = (await self.open()).session_settings
        assert settings is None or settings == SessionSettings()

    async def test_settings_are_kept(self) -> None:
        """Settings given are the settings read."""
        session = await self.open(session_settings=SessionSettings(limit=2))
        assert session.session_settings == SessionSettings(limit=2)

    async def test_settings_are_coerced_from_a_dict(self) -> None:
        """The Runner reads `.limit` and `.resolve`, which a dict lacks."""
        session = await self.open(session_settings={"limit": 2})
        assert isinstance(session.session_settings, SessionSettings)
        assert session.session_settings.limit == 2

    async def test_settings_can_be_assigned(self) -> None:
        """EncryptedSession writes the settings through."""
        session = await self.filled(3)
        session.session_settings = SessionSettings(limit=1)
        assert texts(await session.get_items()) == ["item 2"]
        session.session_settings = None
        assert len(await session.get_items()) == 3

    async def test_settings_assigned_as_a_dict_are_coerced(self) -> None:
        """A dict assigned later is as good as one in the constructor."""
        session = await self.filled(3)
        session.session_settings = {"limit": 1}
        assert isinstance(session.session_settings, SessionSettings)
        assert texts(await session.get_items()) == ["item 2"]

    async def test_settings_belong_to_one_object(self) -> None:
        """Assigning settings doesn't change other sessions."""
        session, other = await self.filled(2), await self.filled(2)
        session.session_settings = SessionSettings(limit=1)
        assert len(await other.get_items()) == 2

    @needs("wrapper")
    async def test_all_methods_declare_wrapper(self) -> None:
        """The SDK passes the run context only if all four methods name it."""
        session = await self.open()
        for name in METHODS:
            parameter = inspect.signature(getattr(session, name)).parameters["wrapper"]
            assert parameter.default is None
            assert parameter.kind in (
                inspect.Parameter.KEYWORD_ONLY,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
            )
        # A private name of the SDK; where it's gone, the loop above says the same.
        accepts = getattr(sdk_session, "_session_accepts_wrapper", None)
        assert accepts is None or accepts(session)

    @needs("wrapper")
    async def test_wrapper_is_accepted(self) -> None:
        """A call with the run context does what a call without does."""
        session = await self.open()
        wrapper: RunContextWrapper[Any] = RunContextWrapper(context={"tenant": 1})
        await session.add_items([message("a"), message("b")], wrapper=wrapper)
        assert texts(await session.get_items(limit=1, wrapper=wrapper)) == ["b"]
        assert_same(await session.pop_item(wrapper=wrapper), message("b"))
        await session.clear_session(wrapper=wrapper)
        assert await session.get_items() == []

    async def test_constructor_makes_nothing_loop_bound(self) -> None:
        """An asyncio primitive made early breaks run_sync and other loops."""
        session = await self.open()
        bound = {
            name: value
            for name, value in getattr(session, "__dict__", {}).items()
            if isinstance(value, LOOP_BOUND)
        }
        assert bound == {}

    def test_serves_event_loops_one_after_another(self) -> None:
        """One object works in a second and third loop after the first is closed."""
        session = self.run_coroutine(self.open)
        for number in range(3):
            item = message(f"loop {number}")
            self.run_coroutine(functools.partial(session.add_items, [item]))
        found = self.run_coroutine(lambda: session.get_items())
        assert texts(found) == ["loop 0", "loop 1", "loop 2"]
        assert self.run_coroutine(lambda: session.pop_item()) == message("loop 2")
