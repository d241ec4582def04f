"""What the package, its archives and the repository's configuration promise."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterable
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import yaml

import agent_sessions

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "agent_sessions"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
CORE = PROJECT["dependencies"]
EXTRAS = PROJECT["optional-dependencies"]
# A group may include others, as a table.
GROUPS = {
    name: [each for each in group if isinstance(each, str)]
    for name, group in PYPROJECT["dependency-groups"].items()
}
TARGETS = set(
    re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
)

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


def build(kind: str, directory: Path) -> Path:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", directory],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    [path] = directory.iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", tmp_path_factory.mktemp("sdist"))


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def named(*requirements: Iterable[str]) -> set[str]:
    """Return the distributions that lists of requirements name."""
    found = (re.match(r"[\w.-]+", each) for many in requirements for each in many)
    return {normalized(match[0]) for match in found if match}


def imported(source: str | bytes) -> set[str]:
    """Return the top-level names that a module imports anywhere in its text."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module)
    return {module.partition(".")[0] for module in modules}


def other_people_s(folder: Path) -> set[str]:
    """Return what a folder imports that is neither Python's nor of this repository."""
    own = {"agent_sessions", "example_project"} | sys.stdlib_module_names
    files = folder.rglob("*.py")
    return set().union(*(imported(file.read_bytes()) for file in files)) - own


@cache
def distributions() -> dict[str, set[str]]:
    """Return the distributions that bring each top-level name."""
    installed = packages_distributions()
    return {name: set(map(normalized, dists)) for name, dists in installed.items()}


def bringing(name: str) -> set[str]:
    return distributions().get(name, {normalized(name)})


def load(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def classified(start: str) -> list[str]:
    """Return the versions that the classifiers of such a start name."""
    found = (
        re.fullmatch(rf"{start} :: (\d+\.\d+)", each) for each in PROJECT["classifiers"]
    )
    return [match[1] for match in found if match]


def test_versions_agree() -> None:
    assert PROJECT["version"] == agent_sessions.__version__


def test_every_import_is_declared() -> None:
    declared = named(CORE, *EXTRAS.values())
    names = other_people_s(PACKAGE)
    assert "django" in names
    assert [name for name in names if not bringing(name) & declared] == []
    declared |= named(GROUPS["demo"], GROUPS["llm"])
    names = other_people_s(ROOT / "example_project")
    assert "uvicorn" in names
    assert [name for name in names if not bringing(name) & declared] == []


def test_everything_declared_is_imported() -> None:
    brought = set().union(*map(bringing, other_people_s(PACKAGE)))
    # The settings of a project name its channel layer; nothing imports it.
    assert named(CORE, *EXTRAS.values()) - brought == {"channels-redis"}


def test_every_dependency_has_a_range() -> None:
    lists = [PYPROJECT["build-system"]["requires"], CORE]
    for requirements in [*lists, *EXTRAS.values(), *GROUPS.values()]:
        for requirement in requirements:
            assert re.search(r">=[\d.]+,<[\d.]+(;|$)", requirement), requirement


def test_the_addresses_name_the_project() -> None:
    assert "Homepage" in PROJECT["urls"]
    for address in PROJECT["urls"].values():
        assert re.match(rf"https://[^?]+/{PROJECT['name']}\b", address)


def test_the_workflow_tests_all_versions_that_are_promised() -> None:
    matrix = load(".github/workflows/tests.yml")["jobs"]["tests"]["strategy"]["matrix"]
    assert matrix["python"] == classified("Programming Language :: Python")
    assert matrix["django"] == classified("Framework :: Django")
    # From 6.0 on Django needs Python 3.12.
    assert matrix["exclude"] == [
        {"python": "3.11", "django": django}
        for django in matrix["django"]
        if float(django) >= 6
    ]


def test_the_workflow_reads_only_and_calls_make() -> None:
    workflow = load(".github/workflows/tests.yml")
    assert workflow["permissions"] == {"contents": "read"}
    called: set[str] = set()
    for job in workflow["jobs"].values():
        assert "permissions" not in job
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"])
                continue
            run = re.fullmatch(
                r"make ([a-z-]+|\$\{\{ matrix\.target \}\})( [A-Z]+=\S.*)?", step["run"]
            )
            assert run, step["run"]
            in_matrix = run[1].startswith("$")
            targets = job["strategy"]["matrix"]["target"] if in_matrix else [run[1]]
            called |= set(targets)
    assert {"check", "test"} <= called <= TARGETS


def test_the_hooks_fetch_nothing_and_call_make() -> None:
    [repository] = load(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    for hook in repository["hooks"]:
        assert hook["language"] == "system"
        assert hook["entry"].removeprefix("make ") in TARGETS


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        "docs/contributing.md",
        ".github/pull_request_template.md",
    ],
)
def test_every_target_that_a_page_names_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = set(re.findall(r"(?m)(?:`|^)make ([a-z-]+)", text))
    assert targets
    assert targets <= TARGETS


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


def test_sdist_has_the_tests_but_no_benchmarks(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        sources = {
            member.name.partition("/")[2]: archive.extractfile(member)
            for member in archive.getmembers()
            if member.isfile()
        }
        assert {"CONTRIBUTING.md", "LICENSE", "SECURITY.md"} <= sources.keys()
        assert f"tests/project/{Path(__file__).name}" in sources
        assert [name for name in sources if name.startswith("benchmarks")] == []
        # A test that needs them would fail there.
        for name, file in sources.items():
            if file and name.endswith(".py"):
                assert "benchmarks" not in imported(file.read()), name
