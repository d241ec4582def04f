"""MariaDB from the machine, or from apt (`tests.servers.provision`)."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from tests.servers.process import HOST, Recipe, Server, serve

_PLACES = os.pathsep.join(("/usr/sbin", "/usr/local/sbin", "/usr/local/bin"))

# The data is thrown away, so nothing waits for the disk.
_FAST = (
    "--innodb-flush-log-at-trx-commit=0",
    "--innodb-doublewrite=0",
    "--innodb-flush-method=nosync",
)


def program(name: str) -> str | None:
    """Find a program of MariaDB; Debian keeps the server where only root looks."""
    return shutil.which(name) or shutil.which(name, path=_PLACES)


def has_driver() -> bool:
    """Return whether mysqlclient is installed."""
    return find_spec("MySQLdb") is not None


def missing() -> str | None:
    """Return what MariaDB lacks to run here, if anything."""
    if not program("mariadbd") or not program("mariadb-install-db"):
        return "MariaDB is missing: apt-get install mariadb-server"
    if not has_driver():
        return (
            "the driver of MariaDB is missing: apt-get install gcc libmariadb-dev "
            "pkg-config python3-dev, then pip install mysqlclient"
        )
    return None


@contextmanager
def mariadb() -> Iterator[Server]:
    """Run a MariaDB server; `root` has no password."""
    with serve(recipe()) as server:
        yield server


def recipe(*, lasting: bool = False) -> Recipe:
    """Return how MariaDB is run; `lasting` keeps what was committed when it's killed."""
    fast = () if lasting else _FAST
    return Recipe(
        name="mariadb",
        command=lambda directory, port: [*_command(directory, port), *fast],
        ready=_ready,
        prepare=_prepare,
    )


def _prepare(directory: Path) -> None:
    subprocess.run(
        [
            program("mariadb-install-db") or "mariadb-install-db",
            "--no-defaults",
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
            *_user(),
            f"--datadir={directory / 'data'}",
        ],
        check=True,
        capture_output=True,
    )


def _command(directory: Path, port: int) -> list[str]:
    return [
        program("mariadbd") or "mariadbd",
        "--no-defaults",
        *_user(),
        f"--datadir={directory / 'data'}",
        f"--socket={directory / 'socket'}",
        f"--pid-file={directory / 'pid'}",
        f"--bind-address={HOST}",
        f"--port={port}",
        "--skip-log-bin",
        "--innodb-fast-shutdown=2",
    ]


def _user() -> list[str]:
    return [] if os.geteuid() else ["--user=root"]


def _ready(port: int) -> bool:
    import MySQLdb

    try:
        MySQLdb.connect(host=HOST, port=port, user="root").close()
    except MySQLdb.OperationalError:
        return False
    return True
