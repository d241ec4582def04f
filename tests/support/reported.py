"""What reports show of an error: Django's, a debugger's, its chain and its text."""

from __future__ import annotations

import traceback
import uuid
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from django.test import override_settings
from django.views.debug import ExceptionReporter

# Made anew, so that no source line that a report quotes has them.
CONTENT = f"content-{uuid.uuid4().hex}"
SECRET = f"secret-{uuid.uuid4().hex}"
ITEMS: list[Any] = [{"role": "user", "content": CONTENT}]


def shown_of(error: BaseException) -> str:
    """Return all that reports show of an error, on pages and in mails, DEBUG or not."""
    told: list[str] = []
    for debug in (False, True):
        with override_settings(DEBUG=debug):
            for is_email in (False, True):
                reporter = ExceptionReporter(
                    None, type(error), error, error.__traceback__, is_email=is_email
                )
                told += [reporter.get_traceback_text(), reporter.get_traceback_html()]
    captured = traceback.TracebackException.from_exception(error, capture_locals=True)
    told += captured.format()
    for each in _chain(error):
        told += [str(each), repr(each), repr(each.args), repr(vars(each))]
        frames = traceback.walk_tb(each.__traceback__)
        # The first frame is that of the test.
        told += [repr(frame.f_locals) for frame, _ in list(frames)[1:]]
    return "\n".join(told)


def assert_discreet(error: BaseException, *secrets: str) -> None:
    """Assert that no report of an error shows contents or secrets."""
    shown = shown_of(error)
    for secret in (CONTENT, SECRET, *secrets):
        place = shown.find(secret)
        assert place < 0, shown[max(0, place - 3000) : place + 200]


def error_of(call: Callable[[], object]) -> BaseException:
    """Call what fails; give its error."""
    try:
        call()
    except Exception as exc:
        return exc
    raise AssertionError("nothing failed")


async def aerror_of(call: Callable[[], Awaitable[object]]) -> BaseException:
    """Await what fails; give its error."""
    try:
        await call()
    except Exception as exc:
        return exc
    raise AssertionError("nothing failed")


def _chain(error: BaseException) -> Iterator[BaseException]:
    found: list[BaseException | None] = [error]
    seen: list[BaseException] = []
    while found:
        each = found.pop()
        if each is not None and each not in seen:
            seen.append(each)
            found += [each.__cause__, each.__context__]
    yield from seen
