"""What is said where an optional dependency is not installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.one_database

ROOT = Path(__file__).parents[2]

# In a process that can't find a package, as if it were not installed.
HIDE = """
import importlib.machinery, importlib.util, sys

hidden = set({hidden!r})


class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            return None
        return importlib.machinery.PathFinder.find_spec(name, path, target)


place = sys.meta_path.index(importlib.machinery.PathFinder)
sys.meta_path[place] = Finder
import django
from django.conf import settings

settings.INSTALLED_APPS = [
    app for app in settings.INSTALLED_APPS if app.partition(".")[0] not in hidden
]
settings.CACHES = {{
    "redis": {{
        "BACKEND": "django_redis.cache.RedisCache",
        "LOCATION": "redis://127.0.0.1:1",
    }}
}}
django.setup()
from agent_sessions.exceptions import AgentSessionError, MissingExtra

for code in {codes!r}:
    try:
        exec(code)
    except MissingExtra as exc:
        assert isinstance(exc, AgentSessionError | ImportError)
        print(exc.extra, exc)
"""


def said(hidden: list[str], *codes: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", HIDE.format(hidden=hidden, codes=codes)],
        env={"DJANGO_SETTINGS_MODULE": "tests.settings", "PATH": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


REDIS = "from agent_sessions import RedisSession as S; "


@pytest.mark.parametrize(
    ("hidden", "extra", "codes"),
    [
        (
            "channels",
            "channels",
            [
                "import agent_sessions.consumers",
                "import agent_sessions.sockets",
            ],
        ),
        (
            "redis",
            "redis",
            [
                REDIS + "S.from_url('a', 'redis://127.0.0.1:1')",
                REDIS + "S('a', object())",
                REDIS + "S.from_cache('a', 'redis')",
            ],
        ),
        (
            "django_redis",
            "redis",
            [REDIS + "S.from_cache('a', 'redis').sync.pop_item()"],
        ),
        (
            "dapr",
            "dapr",
            ["from agent_sessions import DaprSession as S; S('a', 's', object())"],
        ),
        ("pytest", "testing", ["import agent_sessions.testing"]),
        ("hypothesis", "testing", ["import agent_sessions.testing"]),
    ],
    ids=["channels", "redis", "django_redis", "dapr", "pytest", "hypothesis"],
)
def test_the_extra_that_is_missing_is_named(
    hidden: str, extra: str, codes: list[str]
) -> None:
    printed = said([hidden], *codes).splitlines()
    assert len(printed) == len(codes)
    for line in printed:
        assert line.startswith(f"{extra} ")
        assert f'pip install "django-agent-sessions[{extra}]"' in line


def test_what_channels_itself_lacks_is_not_called_an_extra() -> None:
    code = (
        "from agent_sessions.exceptions import extra\n"
        "try:\n"
        "    with extra('channels', 'channels', needed_by='this'):\n"
        "        import no_such_package\n"
        "except ModuleNotFoundError as exc:\n"
        "    print(type(exc).__name__, exc.name)"
    )
    assert said([], code).split() == ["ModuleNotFoundError", "no_such_package"]


def test_streams_need_no_channels() -> None:
    code = "import agent_sessions.streams; print('channels' in sys.modules)"
    assert said(["channels"], code).strip() == "False"


def test_everything_is_imported_without_the_types_of_ag_ui() -> None:
    code = (
        "import agent_sessions.consumers, agent_sessions.agui, agent_sessions.runs; "
        "print('ag_ui' in sys.modules)"
    )
    assert said(["ag_ui"], code).strip() == "False"
