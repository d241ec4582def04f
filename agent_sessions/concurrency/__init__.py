"""Threads, event loops, connections and forks: how every backend waits for others."""

from __future__ import annotations
