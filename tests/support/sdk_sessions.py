"""Session classes as a project might write them, for the tests of SDKBackend."""

from __future__ import annotations

from typing import Any, ClassVar

from agents.memory import OpenAIConversationsSession, SessionSettings


class ListSession:
    """Keeps lists in a dict of the class; counts what is open."""

    histories: ClassVar[dict[str, list[Any]]] = {}
    opened: ClassVar[list[str]] = []
    closed: ClassVar[list[str]] = []

    session_settings: SessionSettings | None = None

    def __init__(self, name: str, database: str, *, loud: bool = False) -> None:
        self.session_id = name
        self.database = database
        self.loud = loud
        self.opened.append(name)

    @classmethod
    def named(cls, session_id: str, **more: Any) -> ListSession:
        return cls(session_id, **more)

    @property
    def items(self) -> list[Any]:
        return self.histories.setdefault(self.session_id, [])

    async def get_items(self, limit: int | None = None) -> list[Any]:
        return self.items if limit is None else self.items[-limit:]

    async def add_items(self, items: list[Any]) -> None:
        if self.loud:
            raise RuntimeError(f"no: {items}")
        self.items.extend(items)

    async def pop_item(self) -> Any:
        return self.items.pop() if self.items else None

    async def clear_session(self) -> None:
        self.items.clear()

    async def aclose(self) -> None:
        self.closed.append(self.session_id)


class Open(ListSession):
    """Takes whatever it is given."""

    def __init__(self, name: str, **more: Any) -> None:
        more.pop("anything", None)
        super().__init__(name, more.pop("database", "d"), **more)


class Conversations(OpenAIConversationsSession):
    """What the Runner must see itself."""

    def __init__(self, conversation_id: str) -> None:
        self._session_id = conversation_id


def make_list(session_id: str, database: str = "d") -> ListSession:
    return ListSession(session_id, database)


Alias = ListSession
NUMBER = 7
