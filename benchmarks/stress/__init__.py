"""Show under load and under `kill -9` that a history stays whole."""

from __future__ import annotations
