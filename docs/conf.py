"""Configuration of Sphinx."""

from __future__ import annotations

import tomllib
from pathlib import Path

_pyproject = tomllib.loads(
    (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
)

project = _pyproject["project"]["name"]
author = _pyproject["project"]["authors"][0]["name"]
copyright = author
version = release = _pyproject["project"]["version"]

extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
nitpicky = True

html_theme = "furo"
html_title = f"{project} {version}"
