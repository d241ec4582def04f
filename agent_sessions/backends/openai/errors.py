"""What an error of OpenAI's client means: whether to try again, and what to tell."""

from __future__ import annotations

import math
import time
from email.utils import parsedate_to_datetime

import httpx2
import openai

from agent_sessions.exceptions import (
    HistoryGone,
    StorageError,
    StoreBusy,
    StoreRefused,
    StoreUnavailable,
)

# Another request works on the conversation; "retry in a few seconds", the service says.
LOCKED = "conversation_locked"
# Seconds between two requests for it, even where the service asks for none.
SHORTEST_WAIT = 0.2
NO_QUOTA = "insufficient_quota"
# The service refused to begin, so that sending again can't write twice: a conflict
# with another request, too early, too many.
_DID_NOTHING = {409, 425, 429}
# A connection was not made: nothing was sent.
_NOT_CONNECTED = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)


class NotSent(StoreUnavailable):
    """OpenAI was not reached, so nothing was written."""


def wait_after(
    exc: openai.OpenAIError, tries: int, most: int, *, writing: bool
) -> float | None:
    """Return the seconds after which a request is sent again, None where it is not.

    `tries` of `most` were made again so far. Reads have been, by the client itself. A
    locked conversation is asked for as long as anybody waits, unless `most` is 0.
    """
    if not most:
        return None
    if not isinstance(exc, openai.APIStatusError):
        again = writing and tries < most and isinstance(exc.__cause__, _NOT_CONNECTED)
        return _pause(tries) if again else None
    if exc.response.headers.get("x-should-retry") == "false" or exc.code == NO_QUOTA:
        return None
    asked = retry_after(exc.response)
    if exc.code == LOCKED:
        return _pause(tries) if asked is None else max(asked, SHORTEST_WAIT)
    if writing and tries < most and exc.status_code in _DID_NOTHING:
        return 1.0 if asked is None else asked
    return None


def _pause(tries: int) -> float:
    return min(0.5 * 2.0**tries, 2.0)


def retry_after(response: httpx2.Response) -> float | None:
    """Return the seconds that a response asks to wait; None where it doesn't."""
    headers = response.headers
    for name, divisor in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            seconds = float(headers[name]) / divisor
        except (KeyError, ValueError):
            continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    until = _moment(headers.get("retry-after"))
    if until is None:
        return None
    # The service's own clock says how far away its moment is.
    now = _moment(headers.get("date"))
    return max(0.0, until - (time.time() if now is None else now))


def _moment(text: str | None) -> float | None:
    try:
        return None if text is None else parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError):
        return None


def unsure(writing: bool) -> str:
    """Return that a write may have arrived; nothing for a read."""
    if not writing:
        return ""
    return (
        " The write may have arrived: read the session before you try again, since "
        "it is not sent a second time."
    )


def named(exc: openai.OpenAIError, *, writing: bool) -> StorageError:
    """Return our error for the client's: it says what to do and has no contents."""
    if isinstance(exc.__cause__, _NOT_CONNECTED):
        return NotSent(
            "OpenAI can't be reached. Check the network and the option 'base_url'. "
            "Nothing was sent."
        )
    if isinstance(exc, openai.APITimeoutError):
        return StoreUnavailable(
            "OpenAI didn't answer in time. Look at status.openai.com, or raise the "
            "option 'timeout'." + unsure(writing)
        )
    if isinstance(exc, openai.APIConnectionError):
        return StoreUnavailable(
            "OpenAI can't be reached. Check the network and the option 'base_url'."
            + unsure(writing)
        )
    if not isinstance(exc, openai.APIStatusError):
        return StorageError(f"OpenAI's client failed ({type(exc).__name__}).")
    return _named_status(exc, writing=writing)


def _named_status(exc: openai.APIStatusError, *, writing: bool) -> StorageError:
    about = _about(exc)
    if exc.code == LOCKED or exc.status_code in _DID_NOTHING:
        return _busy(exc, about)
    if isinstance(exc, openai.NotFoundError):
        return HistoryGone(
            f"OpenAI has no such conversation any more ({about}). It was deleted there, "
            "or belongs to another project's key. Clear the session to begin anew."
        )
    if isinstance(exc, openai.AuthenticationError | openai.PermissionDeniedError):
        return StoreRefused(
            f"OpenAI refused the API key ({about}). Check OPENAI_API_KEY, or the "
            "option 'api_key', and the key's permissions."
        )
    if exc.status_code >= 500 or exc.status_code == 408:
        return StoreUnavailable(
            f"OpenAI failed ({about}). Look at status.openai.com." + unsure(writing)
        )
    return StorageError(
        f"OpenAI refused a request ({about}); nothing was written. The service takes "
        "only items that it knows."
    )


def _busy(exc: openai.APIStatusError, about: str) -> StorageError:
    wait = retry_after(exc.response)
    if exc.code == NO_QUOTA:
        return StoreRefused(
            f"The quota at OpenAI is used up ({about}); nothing was written. Look at "
            "the project's billing and limits."
        )
    what = "OpenAI takes no more requests for now"
    if exc.status_code != 429:
        what = "OpenAI is at work on the conversation for another request"
    when = "" if wait is None else f" in {wait:g} seconds"
    return StoreBusy(
        f"{what} ({about}); nothing was written. Try again{when}.", retry_after=wait
    )


def _about(exc: openai.APIStatusError) -> str:
    """Return an error's status, code and number; its message may quote the items."""
    parts = [f"status {exc.status_code}"]
    parts += [f"code {exc.code}"] if exc.code else []
    parts += [f"request {exc.request_id}"] if exc.request_id else []
    return ", ".join(parts)
