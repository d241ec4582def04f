"""Guarded functions: what their errors keep, and what they leave behind."""

from __future__ import annotations

import asyncio
import inspect
import traceback
from collections.abc import Callable
from typing import Any

import pytest
from django.db import DataError, connection

from agent_sessions.reports import clear, guard_public_methods, guarded, place_of, told
from tests.support.reported import (
    CONTENT,
    aerror_of,
    assert_discreet,
    error_of,
    shown_of,
)

pytestmark = pytest.mark.one_database


def inner(given: str) -> None:
    raise ValueError("refused")


def chained(given: str) -> None:
    try:
        raise KeyError("a key")
    except KeyError as exc:
        raise ValueError("refused") from exc


def hidden(given: str) -> None:
    try:
        raise KeyError(given)
    except KeyError:
        raise ValueError("refused") from None


def grouped(given: str) -> None:
    errors: list[Exception] = [error for error in [_error_with(given)] if error]
    raise ExceptionGroup("several", errors)


def _error_with(given: str) -> Exception | None:
    try:
        inner(given)
    except ValueError as exc:
        return exc
    return None


def encoded(given: str) -> None:
    f"{given}é".encode("ascii")


def decoded(given: str) -> None:
    (given.encode() + b"\xff").decode("ascii")


def generated(given: str) -> None:
    def items() -> Any:
        yield given
        inner(given)

    list(items())


FAILING = [inner, chained, hidden, grouped, encoded, decoded, generated]


@pytest.mark.parametrize("function", FAILING)
def test_errors_leave_the_variables_behind(function: Callable[[str], None]) -> None:
    assert CONTENT in shown_of(error_of(lambda: function(CONTENT)))
    assert_discreet(error_of(lambda: guarded(function)(CONTENT)))


@pytest.mark.parametrize("function", FAILING)
async def test_errors_of_coroutines_leave_the_variables_behind(
    function: Callable[[str], None],
) -> None:
    async def outer(given: str) -> None:
        await asyncio.sleep(0)
        await asyncio.to_thread(function, given)

    assert CONTENT in shown_of(await aerror_of(lambda: outer(CONTENT)))
    assert_discreet(await aerror_of(lambda: guarded(outer)(CONTENT)))


def test_files_and_lines_stay() -> None:
    error = error_of(lambda: guarded(chained)(CONTENT))
    assert isinstance(error.__cause__, KeyError)
    names = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    assert names == ["error_of", "<lambda>", "chained"]


def test_the_callers_own_variables_stay() -> None:
    """What is being handled when a door is called is the caller's."""

    def call() -> None:
        mine = "the caller's"
        try:
            raise LookupError(mine)
        except LookupError:
            guarded(inner)(CONTENT)

    def failing() -> None:
        own = "of the caller"
        raise LookupError(own)

    def call_while_handling() -> None:
        try:
            failing()
        except LookupError:
            guarded(inner)(CONTENT)

    error = error_of(call_while_handling)
    assert error.__context__ is not None
    frames = [frame for frame, _ in traceback.walk_tb(error.__context__.__traceback__)]
    assert frames[-1].f_locals == {"own": "of the caller"}
    assert "the caller's" in shown_of(error_of(call))


async def test_a_coroutine_that_caught_the_error_goes_on() -> None:
    """Clearing the frame of one that waits would end it, before Python 3.13."""
    caught: list[Exception] = []
    goes_on = asyncio.Event()

    async def catch() -> str:
        try:
            inner(CONTENT)
        except ValueError as exc:
            caught.append(exc)
        await goes_on.wait()
        return "still here"

    task = asyncio.create_task(catch())
    await asyncio.sleep(0)
    clear(caught[0])
    goes_on.set()
    assert await task == "still here"


def test_guarded_methods_look_as_before() -> None:
    class Plain:
        def __init__(self, given: str) -> None:
            self.given = given

        async def wait(self, number: int) -> int:
            return number

        @classmethod
        def make(cls, given: str) -> Plain:
            return cls(given)

        @property
        def double(self) -> str:
            return self.given * 2

    before = {
        name: inspect.signature(getattr(Plain, name)) for name in ("wait", "make")
    }
    guard_public_methods(Plain)
    made = Plain.make("x")
    assert type(made) is Plain
    assert made.double == "xx"
    assert asyncio.run(made.wait(3)) == 3
    assert inspect.iscoroutinefunction(made.wait)
    for name, signature in before.items():
        assert inspect.signature(getattr(Plain, name)) == signature


@pytest.mark.django_db
def test_database_errors_keep_what_may_be_told() -> None:
    def query(given: str) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT * FROM nowhere WHERE name = %s", [given])

    error = error_of(lambda: guarded(guarded(query))(CONTENT))
    assert "nowhere" in str(error)
    assert_discreet(error)


class Diagnostics:
    """What psycopg tells of an error."""

    def __init__(
        self, primary: str = "", context: str = "", constraint: str = ""
    ) -> None:
        self.message_primary = primary
        self.context = context
        self.constraint_name = constraint
        self.table_name = "table_of_items" if constraint else ""


class FromServer(Exception):
    """Looks as an error of psycopg does."""

    def __init__(self, sqlstate: str, diag: Diagnostics) -> None:
        super().__init__(f"{diag.message_primary}\nDETAIL: {CONTENT}")
        self.sqlstate = sqlstate
        self.diag = diag


@pytest.mark.parametrize(
    ("state", "diagnostics", "expected"),
    [
        ("42P01", Diagnostics("relation is gone"), "42P01, relation is gone"),
        ("53100", Diagnostics("disk full."), "53100, disk full"),
        ("22P02", Diagnostics(CONTENT), "22P02"),
        ("P0001", Diagnostics(CONTENT), "P0001"),
        ("42501", Diagnostics(CONTENT, context="PL/pgSQL function f()"), "42501"),
        (
            "23514",
            Diagnostics(CONTENT, constraint="short"),
            "23514, constraint short of table table_of_items",
        ),
    ],
)
def test_a_servers_words_are_told_where_they_quote_no_values(
    state: str, diagnostics: Diagnostics, expected: str
) -> None:
    error = DataError(CONTENT)
    error.__cause__ = FromServer(state, diagnostics)
    assert told(error) == f"DataError: {expected}"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((2002, "Can't connect to server"), "DataError: 2002, Can't connect to server"),
        ((1062, f"Duplicate entry '{CONTENT}'"), "DataError: 1062"),
        ((CONTENT,), "DataError"),
        ((), "DataError"),
    ],
)
def test_mysqls_words_are_told_of_the_connection_only(
    arguments: tuple[Any, ...], expected: str
) -> None:
    error = DataError(*arguments)
    error.__cause__ = Exception(*arguments)
    assert told(error) == expected


def test_the_place_of_an_error_is_told_without_its_words() -> None:
    error = error_of(lambda: inner(CONTENT))
    line = inspect.getsourcelines(inner)[1] + 1
    assert place_of(error) == f"ValueError in {__file__}, line {line}"
    assert place_of(ValueError(CONTENT)) == "ValueError"
