"""The tests' settings with django-unfold in the place of the admin's own look."""

from __future__ import annotations

from tests.settings import *  # noqa: F403
from tests.settings import INSTALLED_APPS as _INSTALLED_APPS

DEBUG = True
INSTALLED_APPS = ["unfold", *_INSTALLED_APPS]
