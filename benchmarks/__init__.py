"""Measure the package beside its peers, in one run, told as ratios."""

from __future__ import annotations
