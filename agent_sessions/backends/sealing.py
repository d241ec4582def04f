"""Texts that lie beside a session's items, signed for the place where they belong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from django.core.signing import BadSignature, Signer
from django.views.decorators.debug import sensitive_variables

from agent_sessions.exceptions import EncryptionError

if TYPE_CHECKING:
    from agent_sessions.backends.keys import SessionKey


class Sealer:
    """What a backend's alias keeps beside the items of its sessions.

    A text opens for the same alias, owner and session only.
    """

    def seal(self, key: SessionKey, text: str) -> str:
        """Make the text that is stored; "" stays so."""
        raise NotImplementedError

    def open(self, key: SessionKey, text: str) -> str:
        """Read what seal() made. Raises EncryptionError."""
        raise NotImplementedError

    @sensitive_variables()
    def open_all(self, texts: Sequence[tuple[SessionKey, str]]) -> list[str | None]:
        """Read many in a fixed number of queries; None is what doesn't open."""
        return [self.open_or_none(key, text) for key, text in texts]

    @sensitive_variables()
    def open_or_none(self, key: SessionKey, text: str) -> str | None:
        """Read a text; None where it doesn't open."""
        try:
            return self.open(key, text)
        except EncryptionError:
            return None


class SigningSealer(Sealer):
    """Texts that anybody may read who reads the items, and nobody may change."""

    def __init__(self, alias: str) -> None:
        self._alias = alias

    @sensitive_variables()
    def seal(self, key: SessionKey, text: str) -> str:
        return self._signer(key).sign(text) if text else ""

    @sensitive_variables()
    def open(self, key: SessionKey, text: str) -> str:
        try:
            return self._signer(key).unsign(text) if text else ""
        except BadSignature:
            raise EncryptionError(
                f"A text of session {key.session_id!r} doesn't open: it was changed, "
                "was written for another session, or was signed with a SECRET_KEY that "
                "SECRET_KEY_FALLBACKS doesn't have any more."
            ) from None  # Django's frames would show the text in an error report.

    def _signer(self, key: SessionKey) -> Signer:
        owner = None if key.user_id is None else str(key.user_id)
        place = json.dumps([self._alias, owner, key.session_id])
        return Signer(salt=f"agent_sessions.text {place}")
