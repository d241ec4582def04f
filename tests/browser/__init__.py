"""The chat page, driven in a real Chromium."""

from __future__ import annotations
