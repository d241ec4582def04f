"""Signals that agent_sessions sends."""

from __future__ import annotations

from django.dispatch import Signal

# Sent after a session was emptied through its backend; arguments: session_id,
# backend (alias), user_id, count (items removed).
session_cleared = Signal()
