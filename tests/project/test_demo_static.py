"""The chat page's files: hashed as wholes, and its addresses below a prefix."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from django.core.management import call_command
from django.test import override_settings
from django.urls import set_script_prefix

from example_project.chat.views import addresses

pytestmark = pytest.mark.one_database


def test_modules_import_each_other_by_their_hashed_names(tmp_path: Path) -> None:
    storage = {"BACKEND": "example_project.storage.HashedModules"}
    here = Path(__file__).resolve().parents[2] / "example_project/chat/static"
    with override_settings(
        STORAGES={"staticfiles": storage},
        STATIC_ROOT=str(tmp_path),
        STATICFILES_DIRS=[str(here)],
    ):
        call_command("collectstatic", interactive=False, verbosity=0)
    hashed = re.compile(r"\.[0-9a-f]{12}\.js$")
    modules = [path for path in tmp_path.glob("chat/*.js") if hashed.search(path.name)]
    imported = {
        name
        for path in modules
        for name in re.findall(r'from "\./([^"]+)"', path.read_text())
    }
    assert len(modules) > 5
    assert len(imported) > 5
    assert imported <= {path.name for path in modules}


def test_addresses_are_below_the_prefix() -> None:
    set_script_prefix("/shop/")
    try:
        with override_settings(ROOT_URLCONF="example_project.urls"):
            urls = addresses()
    finally:
        set_script_prefix("/")
    assert urls["socket"] == "/shop/ws/agents/ID/"
    assert all(url.startswith("/shop/") for url in urls.values())


def test_sockets_are_found_below_the_prefix_and_without(tmp_path: Path) -> None:
    settings = "from example_project.settings import *; FORCE_SCRIPT_NAME = '/shop'"
    (tmp_path / "below.py").write_text(settings)
    code = (
        "from example_project.asgi import websocket_urlpatterns as routes\n"
        "for path in ('ws/agents/x/', 'shop/ws/agents/x/'):\n"
        "    assert any(route.pattern.match(path) for route in routes), path\n"
    )
    root = Path(__file__).resolve().parents[2]
    env = os.environ | {
        "DEMO_FOLDER": str(tmp_path),
        "DJANGO_SETTINGS_MODULE": "below",
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}",
    }
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
