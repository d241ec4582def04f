"""The chat page."""

from __future__ import annotations
