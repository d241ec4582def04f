"""Texts that lie beside a session's items, signed for the place where they belong."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from django.core.signing import BadSignature, Signer
from django.views.decorators.debug import sensitive_variables

from agent_sessions.exceptions import EncryptionError

if TYPE_CHECKING:
    from agent_sessions.backends.base import BaseSessionBackend, SessionKey


@sensitive_variables()
def sign(alias: str, key: SessionKey, text: str) -> str:
    """Sign a text, so that it opens for the same alias, owner and session only."""
    return _signer(alias, key).sign(text)


@sensitive_variables()
def unsign(alias: str, key: SessionKey, text: str) -> str:
    """Read what sign() made. Raises EncryptionError."""
    try:
        return _signer(alias, key).unsign(text)
    except BadSignature:
        raise EncryptionError(
            f"A text of session {key.session_id!r} doesn't open: it was changed, was "
            "written for another session, or was signed with a SECRET_KEY that "
            "SECRET_KEY_FALLBACKS doesn't have any more."
        ) from None  # Django's frames would show the text in an error report.


@sensitive_variables()
def open_or_none(backend: BaseSessionBackend, key: SessionKey, text: str) -> str | None:
    """Read a text that lies beside items; None where it doesn't open."""
    try:
        return backend.open_text(key, text)
    except EncryptionError:
        return None


def _signer(alias: str, key: SessionKey) -> Signer:
    owner = None if key.user_id is None else str(key.user_id)
    place = json.dumps([alias, owner, key.session_id])
    return Signer(salt=f"agent_sessions.text {place}")
