"""The AGENT_SESSIONS setting and the handler that reads it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
from django.test import override_settings

from agent_sessions import DjangoSession, get_session, sessions
from agent_sessions.backends.base import (
    BaseSessionBackend,
)
from agent_sessions.backends.database import DatabaseBackend
from agent_sessions.backends.options import (
    did_you_mean,
)
from agent_sessions.exceptions import (
    AgentSessionError,
    InvalidBackend,
    InvalidSessionId,
    MissingExtra,
)
from agent_sessions.handler import DATABASE_BACKEND, UNLISTED, SessionBackendHandler

DATABASE = {"BACKEND": DATABASE_BACKEND}


class NeedsSecret(DatabaseBackend):
    """A backend with an option that must be given."""

    required_options = frozenset({"secret"})


class NeedsExtra(DatabaseBackend):
    """A backend whose optional dependency is missing."""

    def __init__(self, alias: str, options: dict[str, Any]) -> None:
        raise MissingExtra("NeedsExtra", "telepathy")


def not_a_backend() -> None:
    """Stand for what BACKEND must not name."""


@pytest.fixture(autouse=True)
def _fresh_handler() -> Iterator[None]:
    sessions.reset()
    yield
    sessions.reset()


def test_without_the_setting_there_is_one_database_backend() -> None:
    assert list(sessions) == ["default"]
    assert type(sessions["default"]) is DatabaseBackend
    assert sessions["default"].alias == "default"


@override_settings(AGENT_SESSIONS=None)
def test_none_is_like_no_setting() -> None:
    assert list(sessions) == ["default"]


@override_settings(AGENT_SESSIONS={"default": DATABASE, "archive": DATABASE})
def test_each_alias_has_one_backend_per_process() -> None:
    assert sessions["archive"] is sessions["archive"]
    assert sessions["archive"] is not sessions["default"]
    assert sessions["archive"].alias == "archive"


@override_settings(AGENT_SESSIONS={"default": {"BACKEND": DatabaseBackend}})
def test_backend_may_be_the_class_itself() -> None:
    assert type(sessions["default"]) is DatabaseBackend


@pytest.mark.parametrize("options", [None, {}, {"threads": None, "database": None}])
def test_options_may_be_empty(options: dict[str, Any] | None) -> None:
    setting = {"default": {**DATABASE, "OPTIONS": options}}
    with override_settings(AGENT_SESSIONS=setting):
        assert sessions["default"].options == {
            "database": None,
            "threads": None,
            "connections": None,
            "prepare_connection": None,
            "max_age": None,
            "max_idle": None,
            "run_session": None,
        }


def test_a_handler_can_be_given_its_settings() -> None:
    handler = SessionBackendHandler({"own": DATABASE})
    assert list(handler) == ["own"]
    assert handler["own"].alias == "own"


def test_a_changed_setting_takes_effect_and_goes_again() -> None:
    before = sessions["default"]
    with override_settings(
        AGENT_SESSIONS={"default": {**DATABASE, "OPTIONS": {"threads": 3}}}
    ):
        assert sessions["default"] is not before
        assert sessions["default"].threads.size == 3
    assert sessions["default"].options["threads"] is None


def test_other_settings_leave_the_backends_alone() -> None:
    before = sessions["default"]
    with override_settings(USE_TZ=True, LANGUAGE_CODE="de"):
        assert sessions["default"] is before


def test_a_repr_tells_no_options() -> None:
    setting = {
        "default": {
            "BACKEND": "tests.checks.test_handler.NeedsSecret",
            "OPTIONS": {"secret": "hush"},
        }
    }
    with override_settings(AGENT_SESSIONS=setting):
        assert repr(sessions["default"]) == "<NeedsSecret 'default'>"


WRONG: dict[str, tuple[Any, str, str]] = {
    "a list": (
        [DATABASE],
        "AGENT_SESSIONS must be a dict of aliases, not a list.",
        "E001",
    ),
    "no default alias": (
        {},
        "AGENT_SESSIONS has no alias 'default'; it has: none.",
        "E002",
    ),
    "a path in place of a dict": (
        {"default": DATABASE_BACKEND},
        "AGENT_SESSIONS['default'] needs a BACKEND",
        "E003",
    ),
    "no BACKEND": (
        {"default": {}},
        "AGENT_SESSIONS['default'] needs a BACKEND",
        "E003",
    ),
    "a path to nowhere": (
        {"default": {"BACKEND": "agent_sessions.backends.nowhere.Backend"}},
        "can't import BACKEND 'agent_sessions.backends.nowhere.Backend'",
        "E004",
    ),
    "a misspelt class": (
        {"default": {"BACKEND": "agent_sessions.backends.database.DatabaseBackendd"}},
        f"Did you mean '{DATABASE_BACKEND}'?",
        "E004",
    ),
    "a word": ({"default": {"BACKEND": "database"}}, "can't import BACKEND", "E004"),
    "a function": (
        {"default": {"BACKEND": "tests.checks.test_handler.not_a_backend"}},
        "is no subclass of BaseSessionBackend",
        "E005",
    ),
    "a number": ({"default": {"BACKEND": 3}}, "is no subclass", "E005"),
    "the abstract base": (
        {"default": {"BACKEND": BaseSessionBackend}},
        "is abstract. Name a subclass that has: append, clear",
        "E005",
    ),
    "a missing extra": (
        {"default": {"BACKEND": "tests.checks.test_handler.NeedsExtra"}},
        'pip install "django-agent-sessions[telepathy]"',
        "E006",
    ),
    "an option beside OPTIONS": (
        {"default": {**DATABASE, "threads": 4}},
        "AGENT_SESSIONS['default'] has unknown keys: threads.",
        "E007",
    ),
    "a misspelt key": (
        {"default": {**DATABASE, "OPTION": {}}},
        "Did you mean 'OPTIONS'?",
        "E007",
    ),
    "a misspelt option": (
        {"default": {**DATABASE, "OPTIONS": {"thread": 4}}},
        "has unknown OPTIONS: thread. Did you mean 'threads'? DatabaseBackend takes: "
        "connections, database, max_age, max_idle, prepare_connection, "
        "run_session, threads.",
        "E008",
    ),
    "a missing option": (
        {"default": {"BACKEND": "tests.checks.test_handler.NeedsSecret"}},
        "lacks OPTIONS that NeedsSecret needs: secret.",
        "E009",
    ),
    "OPTIONS that are a list": (
        {"default": {**DATABASE, "OPTIONS": []}},
        "['OPTIONS'] must be a dict, not a list.",
        "E010",
    ),
    "an unknown database": (
        {"default": {**DATABASE, "OPTIONS": {"database": "defalt"}}},
        "DATABASES has no alias 'defalt'; it has: default. Did you mean 'default'?",
        "E011",
    ),
    "no threads": (
        {"default": {**DATABASE, "OPTIONS": {"threads": 0}}},
        "threads must be a whole number of 1 or more, not 0.",
        "E012",
    ),
    "true threads": (
        {"default": {**DATABASE, "OPTIONS": {"threads": True}}},
        "not True",
        "E012",
    ),
    "threads in words": (
        {"default": {**DATABASE, "OPTIONS": {"threads": "four"}}},
        "not 'four'.",
        "E012",
    ),
    "a long alias": (
        {"default": DATABASE, "a" * 65: DATABASE},
        "an alias is a str of 1 to 64 characters.",
        "E014",
    ),
    "an alias that is no str": (
        {"default": DATABASE, 7: DATABASE},
        "AGENT_SESSIONS[7]: an alias is a str",
        "E014",
    ),
}


@pytest.mark.parametrize(("setting", "message", "check_id"), WRONG.values(), ids=WRONG)
def test_a_mistake_is_named_with_its_alias_and_a_way_out(
    setting: Any, message: str, check_id: str
) -> None:
    alias = next((a for a in setting if a != "default"), "default")
    alias = "default" if isinstance(setting, list) else alias
    with (
        override_settings(AGENT_SESSIONS=setting),
        pytest.raises(InvalidBackend) as caught,
    ):
        sessions[alias]
    assert message in str(caught.value)
    assert "AGENT_SESSIONS" in str(caught.value)
    assert caught.value.id == f"agent_sessions.{check_id}"
    assert caught.value.hint
    assert str(caught.value) == f"{caught.value.message} {caught.value.hint}"


def test_an_unknown_alias_names_those_there_are() -> None:
    with (
        override_settings(AGENT_SESSIONS={"default": DATABASE, "archive": DATABASE}),
        pytest.raises(InvalidBackend, match="has no alias 'archiv'; it has: archive, "),
    ):
        sessions["archiv"]


def test_get_session_tells_of_a_wrong_backend_and_a_wrong_id() -> None:
    with pytest.raises(InvalidBackend, match="has no alias 'redis'"):
        get_session("chat", backend="redis")
    with pytest.raises(InvalidSessionId, match="1 to 255 characters"):
        get_session("")
    with pytest.raises(AgentSessionError):
        get_session("x" * 256)


def test_a_missing_extra_at_import_is_told_too(tmp_path: Any, monkeypatch: Any) -> None:
    module = tmp_path / "lacking_backend.py"
    module.write_text(
        "from agent_sessions.exceptions import MissingExtra\n"
        "raise MissingExtra('LackingBackend', 'redis')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    setting = {"default": {"BACKEND": "lacking_backend.LackingBackend"}}
    with (
        override_settings(AGENT_SESSIONS=setting),
        pytest.raises(
            InvalidBackend, match=r"django-agent-sessions\[redis\]"
        ) as caught,
    ):
        sessions["default"]
    assert caught.value.id == "agent_sessions.E006"
    # DjangoSession needs none of it.
    with override_settings(AGENT_SESSIONS=setting):
        assert DjangoSession("chat").backend.alias == f"{UNLISTED}default"
    sys.modules.pop("lacking_backend", None)


class TestDjangoSession:
    def test_uses_the_configured_alias_of_its_database(self) -> None:
        assert DjangoSession("chat").backend is sessions["default"]
        assert DjangoSession("chat", database="default").backend is sessions["default"]

    def test_uses_a_subclass_too(self) -> None:
        setting = {
            "default": {
                "BACKEND": "tests.checks.test_handler.NeedsSecret",
                "OPTIONS": {"secret": "x"},
            }
        }
        with override_settings(AGENT_SESSIONS=setting):
            assert DjangoSession("chat").backend is sessions["default"]

    def test_needs_no_setting_that_fits(self) -> None:
        with override_settings(AGENT_SESSIONS={"default": {"BACKEND": "no.Where"}}):
            backend = DjangoSession("chat").backend
        assert type(backend) is DatabaseBackend
        assert backend.alias == f"{UNLISTED}default"

    def test_an_unlisted_alias_is_found_again_from_its_row(self) -> None:
        with override_settings(AGENT_SESSIONS={}):
            alias = f"{UNLISTED}default"
            assert sessions[alias] is DjangoSession("chat").backend
            with pytest.raises(InvalidBackend):
                sessions[f"{UNLISTED}elsewhere"]
            with pytest.raises(InvalidBackend):
                sessions[UNLISTED]

    def test_refuses_an_unknown_database(self) -> None:
        with pytest.raises(InvalidBackend, match="DATABASES has no alias 'elsewhere'"):
            DjangoSession("chat", database="elsewhere")


@pytest.mark.parametrize(
    ("setting", "alias", "said"),
    [
        (
            {"defalt": {"BACKEND": DATABASE_BACKEND}},
            "default",
            "If 'defalt' is a misspelt 'default', rename it.",
        ),
        (
            {"default": {"BACKEND": DATABASE_BACKEND}},
            "defalt",
            "Did you mean 'default'?",
        ),
        (
            {"default": {"BACKEND": DATABASE_BACKEND}},
            "Default",
            "Did you mean 'default'?",
        ),
        ({"room": {"BACKEND": DATABASE_BACKEND}}, "default", "it has: room. Add"),
    ],
)
def test_nothing_misspelt_is_suggested(
    setting: dict[str, Any], alias: str, said: str
) -> None:
    with override_settings(AGENT_SESSIONS=setting), pytest.raises(InvalidBackend) as e:
        get_session("room", backend=alias)
    assert said in str(e.value)
    assert "Did you mean 'defalt'" not in str(e.value)


def test_a_word_that_is_spelt_right_is_not_suggested() -> None:
    assert did_you_mean(["threads"], ["threads", "thread"]) == ""
    assert did_you_mean(["options", "THREADS"], ["OPTIONS", "threads"]) == (
        "Did you mean 'OPTIONS' or 'threads'? "
    )
