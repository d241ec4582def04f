"""The tests' settings with the demo's content security policy, for the stock admin."""

from __future__ import annotations

from example_project.settings import SECURE_CSP as SECURE_CSP
from tests.settings import *  # noqa: F403
from tests.settings import MIDDLEWARE as _MIDDLEWARE

DEBUG = True
MIDDLEWARE = ["example_project.csp.ContentSecurityPolicyMiddleware", *_MIDDLEWARE]
