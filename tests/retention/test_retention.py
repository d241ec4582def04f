"""How long a history is kept: max_idle and max_age of OPTIONS."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from django.core import checks
from django.test import override_settings

from agent_sessions import sessions
from agent_sessions.backends.options import Retention, parse_age
from agent_sessions.exceptions import InvalidBackend
from agent_sessions.handler import DATABASE_BACKEND

DAY = timedelta(days=1)


@pytest.fixture(autouse=True)
def _fresh_handler() -> Iterator[None]:
    sessions.reset()
    yield
    sessions.reset()


def configured(**options: Any) -> dict[str, Any]:
    return {"default": {"BACKEND": DATABASE_BACKEND, "OPTIONS": options}}


@pytest.mark.parametrize(
    ("text", "age"),
    [
        ("30d", 30 * DAY),
        ("2w", 14 * DAY),
        ("12h", DAY / 2),
        ("90m", timedelta(minutes=90)),
        ("5s", timedelta(seconds=5)),
        ("1d12h", 1.5 * DAY),
        (" 1d ", DAY),
        (DAY, DAY),
    ],
    ids=repr,
)
def test_an_age_is_a_timedelta_or_text(text: Any, age: timedelta) -> None:
    assert parse_age(text) == age


NO_AGES: list[Any] = [
    *("", "30", "d", "-1d", "1.5d", "30 days", "1d 12h", "1y", "0d", "٣d"),
    *("9" * 30 + "d", 30, 1.5, None, True, timedelta(0), -DAY),
]


@pytest.mark.parametrize("value", NO_AGES, ids=repr)
def test_anything_else_is_no_age(value: Any) -> None:
    with pytest.raises(ValueError, match=r"length of time|longer than"):
        parse_age(value)


def test_a_backend_tells_its_retention() -> None:
    with override_settings(
        AGENT_SESSIONS=configured(max_idle="30d", max_age=365 * DAY)
    ):
        assert sessions["default"].retention == Retention(30 * DAY, 365 * DAY)
    with override_settings(AGENT_SESSIONS=configured(max_idle="30d")):
        assert sessions["default"].retention == Retention(max_idle=30 * DAY)
        assert sessions["default"].retention
    with override_settings(AGENT_SESSIONS=configured()):
        assert not sessions["default"].retention


# Django's own checks ask the database what it can.
@pytest.mark.django_db
@pytest.mark.parametrize("name", ["max_idle", "max_age"])
def test_a_wrong_age_is_a_check_error(name: str) -> None:
    with override_settings(AGENT_SESSIONS=configured(**{name: "30 days"})):
        with pytest.raises(InvalidBackend, match=f"{name} is no length of time"):
            sessions["default"]
        (error,) = [e for e in checks.run_checks() if e.id == "agent_sessions.E016"]
    assert error.msg == (
        f"AGENT_SESSIONS['default']: {name} is no length of time: '30 days'."
    )
    assert '"30d"' in str(error.hint)
