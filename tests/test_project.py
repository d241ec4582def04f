from __future__ import annotations

import json
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import agent_sessions

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "agent_sessions"

# What costs seconds or may not be installed.
BARRED = ["agents", "channels", "ag_ui", "redis", "dapr", "openai", "cryptography"]

_START = f"""
import json, os, sys
os.environ["DJANGO_SETTINGS_MODULE"] = "tests.settings"
import django
django.setup()
from django.core.management import call_command
call_command(*sys.argv[1:])
barred = {BARRED!r}
print(json.dumps([name for name in barred if name in sys.modules]), file=sys.stderr)
"""

_INSTALLED = """
import sys
import django
from django.conf import settings
settings.configure(
    DATABASES={"default": {
        "ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"
    }},
    INSTALLED_APPS=[
        "django.contrib.auth", "django.contrib.contenttypes", "agent_sessions"
    ],
    USE_TZ=True,
)
django.setup()
import agent_sessions
from django.core.management import call_command
call_command("migrate", verbosity=0)
call_command("makemigrations", "agent_sessions", check=True, verbosity=0)
from agent_sessions.models import AgentSession
print(agent_sessions.__file__, agent_sessions.__version__, AgentSession.objects.count())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", directory],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    [path] = directory.glob("*.whl")
    return path


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == agent_sessions.__version__


@pytest.mark.parametrize(
    "command",
    [
        ["check"],
        ["check", "--deploy", "--fail-level=CRITICAL"],
        ["makemigrations", "--check", "--dry-run"],
    ],
    ids=" ".join,
)
def test_starting_django_imports_nothing_slow_or_optional(command: list[str]) -> None:
    child = subprocess.run(
        [sys.executable, "-c", _START, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    assert json.loads(child.stderr.splitlines()[-1]) == []


def test_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == expected
    assert "agent_sessions/py.typed" in names
    assert "agent_sessions/migrations/0001_initial.py" in names


def test_wheel_installs_and_migrates(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "--disable-pip-version-check", "install"),
            *("--quiet", "--no-deps", "--no-index", "--target", target, wheel),
        ],
        check=True,
        capture_output=True,
    )
    child = subprocess.run(
        [sys.executable, "-c", _INSTALLED],
        cwd=tmp_path,
        env={"PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    where, version, count = child.stdout.split()
    assert Path(where).is_relative_to(target)
    assert (version, count) == (agent_sessions.__version__, "0")
