"""The seats that a user's connections take in this process."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Protocol


class Seated(Protocol):
    """A connection that takes a seat among its user's."""

    def get_up(self) -> None:
        """Leave its seats."""

    async def displace(self, *, shutting_down: bool = False) -> None:
        """Make room for a newer one, or leave as all do."""


class Seats:
    """Who sits where; the newest find a seat."""

    def __init__(self, do: Callable[[Coroutine[Any, Any, None]], None]) -> None:
        """Take what carries out a coroutine in a task of its own."""
        self._do = do
        self._seats: dict[Hashable, dict[Seated, None]] = {}

    @property
    def taken(self) -> set[Seated]:
        """All who sit."""
        return {each for seated in self._seats.values() for each in seated}

    def take(self, seat: Hashable, socket: Seated, limit: int) -> None:
        """Seat one more socket of a user; the oldest ones over the limit must go.

        They are those that nobody may be listening to any more: a phone that lost its
        network leaves sockets that look open.
        """
        seated = self._seats.setdefault(seat, {})
        seated[socket] = None
        for oldest in list(seated)[: max(len(seated) - limit, 0)]:
            oldest.get_up()
            self._do(oldest.displace())

    def leave(self, seat: Hashable, socket: Seated) -> None:
        """Free the seat of a socket."""
        seated = self._seats.get(seat, {})
        seated.pop(socket, None)
        if not seated:
            self._seats.pop(seat, None)
