"""Encrypt items: keys, envelopes, and what one session's keys open. No Django here."""

from __future__ import annotations

from agent_sessions.encryption.cache import Memory
from agent_sessions.encryption.envelopes import is_envelope
from agent_sessions.encryption.keys import KeyRing, MasterKey, session_context
from agent_sessions.encryption.reading import adrive, drive, looking, popping, reading
from agent_sessions.encryption.vault import Vault

__all__ = [
    "KeyRing",
    "MasterKey",
    "Memory",
    "Vault",
    "adrive",
    "drive",
    "is_envelope",
    "looking",
    "popping",
    "reading",
    "session_context",
]
