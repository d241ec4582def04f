"""The demo: a chat page whose agent remembers."""

from __future__ import annotations
