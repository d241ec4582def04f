"""Settings of the test project.

AGENT_SESSIONS_TEST_DATABASE chooses what `default` is: sqlite, postgres or mariadb.
The fixtures of conftest.py start that server and fill in where it listens; a child
process of a test is told by the other AGENT_SESSIONS_TEST_* variables.
"""

from __future__ import annotations

import os
from typing import Any

# The SDK reads it when it is imported; no test sends traces anywhere.
os.environ["OPENAI_AGENTS_DISABLE_TRACING"] = "1"

DATABASE_KIND = os.environ.get("AGENT_SESSIONS_TEST_DATABASE", "sqlite")
_NAME = os.environ.get("AGENT_SESSIONS_TEST_NAME")
_PLACE: dict[str, Any] = {
    "HOST": os.environ.get("AGENT_SESSIONS_TEST_HOST", "127.0.0.1"),
    "PORT": os.environ.get("AGENT_SESSIONS_TEST_PORT", ""),
}
_KINDS: dict[str, dict[str, Any]] = {
    "sqlite": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": _NAME or ":memory:",
        "OPTIONS": {
            "transaction_mode": "IMMEDIATE",
            "timeout": 20,
            "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;",
        },
        "TEST": {},
    },
    "postgres": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": _NAME or "agents",
        "USER": "postgres",
        **_PLACE,
        "TEST": {},
    },
    "mariadb": {
        "ENGINE": "django.db.backends.mysql",
        "NAME": _NAME or "agents",
        "USER": "root",
        **_PLACE,
        "OPTIONS": {"charset": "utf8mb4"},
        "TEST": {"CHARSET": "utf8mb4"},
    },
}

DATABASES = {"default": _KINDS[DATABASE_KIND]}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

SECRET_KEY = "only for tests"
ALLOWED_HOSTS = ["localhost", "127.0.0.1"]
USE_TZ = True
TIME_ZONE = "UTC"
LANGUAGE_CODE = "en"

# Channels is not in here: a consumer needs its routing and layers, not its app, and
# so the import bar of test_project.py holds for these settings.
INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "django.contrib.staticfiles",
    "agent_sessions",
    "django_tasks_db",
]
# For Django 5.2 it is the backport's.
TASKS = {"default": {"BACKEND": "django_tasks_db.DatabaseBackend"}}
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.locale.LocaleMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    },
]
ROOT_URLCONF = "tests.urls"
STATIC_URL = "static/"
LOGIN_URL = "/admin/login/"
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
CHANNEL_LAYERS: dict[str, Any] = {
    "default": {"BACKEND": "channels.layers.InMemoryChannelLayer"}
}
if layer := os.environ.get("AGENT_SESSIONS_TEST_LAYER"):
    CHANNEL_LAYERS["default"] = {
        "BACKEND": "channels_redis.core.RedisChannelLayer",
        # redis-py 8 gives up reading after 5 s, just when the layer stops waiting.
        "CONFIG": {"hosts": [{"address": layer, "socket_timeout": None}]},
    }
