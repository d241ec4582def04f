"""Show with real servers that runs outlive tabs, processes and `kill -9`."""

from __future__ import annotations
