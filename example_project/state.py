"""The folder where the demo keeps what must not be committed."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent


def folder() -> Path:
    """Return the demo's folder, made on first use and ignored by git."""
    path = Path(os.environ.get("DEMO_FOLDER") or PROJECT / ".demo")
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    ignore = path / ".gitignore"
    if not ignore.exists():
        ignore.write_text("*\n", encoding="utf-8")
    return path


def secret_key() -> str:
    """Return the signing key: the environment's, or one made for this checkout."""
    return os.environ.get("DJANGO_SECRET_KEY") or _kept(
        "secret_key", secrets.token_urlsafe(50)
    )


def passwords() -> dict[str, str]:
    """Return the demo's users and their passwords, the same ones every time."""
    made = {name: secrets.token_urlsafe(9) for name in ("demo", "admin")}
    kept: dict[str, str] = json.loads(_kept("passwords.json", json.dumps(made)))
    return kept


def _kept(name: str, value: str) -> str:
    path = folder() / name
    if not path.exists():
        draft = path.with_name(f".{name}.{secrets.token_hex(4)}")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(value)
        # A link refuses to replace: of two processes that start, one key wins.
        try:
            os.link(draft, path)
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    return path.read_text(encoding="utf-8")
