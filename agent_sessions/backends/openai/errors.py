"""What an error of OpenAI's client means: whether to try again, and what to tell."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import httpx2
import openai

from agent_sessions.backends.remote.base import Advice, class_names, find_advice
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
UNSURE = (
    " The write may have arrived: read the session before you try again, since it is "
    "not sent a second time."
)


class NotSent(StoreUnavailable):
    """OpenAI was not reached, so nothing was written."""


_KEY: Advice = (
    StoreRefused,
    "OpenAI refused the API key ({about}). Check OPENAI_API_KEY, or the option "
    "'api_key', and the key's permissions.",
)
_AT_WORK: Advice = (
    StoreBusy,
    "OpenAI is at work on the conversation for another request ({about}); nothing was "
    "written. Try again{when}.",
)
_FAILED: Advice = (
    StoreUnavailable,
    "OpenAI failed ({about}). Look at status.openai.com.{unsure}",
)
_NOT_SENT: Advice = (
    NotSent,
    "OpenAI can't be reached. Check the network and the option 'base_url'. Nothing was "
    "sent.",
)
# The service's code, the status, or the name of a class of the client.
_ADVICE: dict[Any, Advice] = {
    NO_QUOTA: (
        StoreRefused,
        "The quota at OpenAI is used up ({about}); nothing was written. Look at the "
        "project's billing and limits.",
    ),
    LOCKED: _AT_WORK,
    409: _AT_WORK,
    425: _AT_WORK,
    429: (
        StoreBusy,
        "OpenAI takes no more requests for now ({about}); nothing was written. Try "
        "again{when}.",
    ),
    404: (
        HistoryGone,
        "OpenAI has no such conversation any more ({about}). It was deleted there, or "
        "belongs to another project's key. Clear the session to begin anew.",
    ),
    401: _KEY,
    403: _KEY,
    408: _FAILED,
    "InternalServerError": _FAILED,
    "APIStatusError": (
        StorageError,
        "OpenAI refused a request ({about}); nothing was written. The service takes "
        "only items that it knows.",
    ),
    **dict.fromkeys([kind.__name__ for kind in _NOT_CONNECTED], _NOT_SENT),
    "APITimeoutError": (
        StoreUnavailable,
        "OpenAI didn't answer in time. Look at status.openai.com, or raise the option "
        "'timeout'.{unsure}",
    ),
    "APIConnectionError": (
        StoreUnavailable,
        "OpenAI can't be reached. Check the network and the option 'base_url'.{unsure}",
    ),
    # Before anything is sent. Its text and its object hold the header.
    "UnicodeError": (
        StorageError,
        "The request to OpenAI can't be written: the option 'api_key', or another "
        "header, is not ASCII. Run manage.py check.",
    ),
}
_OTHER: Advice = (StorageError, "OpenAI's client failed ({about}).")


def named(exc: Exception, *, writing: bool) -> StorageError:
    """Return the error of ours that says what to do, without any contents."""
    unsure = UNSURE if writing else ""
    if not isinstance(exc, openai.APIStatusError):
        cause = [] if exc.__cause__ is None else class_names(exc.__cause__)
        kind, text = find_advice([*cause, *class_names(exc)], _ADVICE, _OTHER)
        return kind(text.format(about=type(exc).__name__, unsure=unsure))
    words = [exc.code, exc.status_code, *class_names(exc)]
    kind, text = find_advice(words, _ADVICE, _OTHER)
    # Its message may quote the items.
    about = [f"status {exc.status_code}"]
    about += [f"code {exc.code}"] if exc.code else []
    about += [f"request {exc.request_id}"] if exc.request_id else []
    wait = retry_after(exc.response)
    when = "" if wait is None else f" in {wait:g} seconds"
    told = text.format(about=", ".join(about), when=when, unsure=unsure)
    return StoreBusy(told, retry_after=wait) if kind is StoreBusy else kind(told)


def wait_after(exc: Exception, tries: int, most: int, *, writing: bool) -> float | None:
    """Return the seconds after which a request is sent again, None where it is not.

    `tries` of `most` were made again so far. Reads have been, by the client itself. A
    locked conversation is asked for as long as anybody waits, unless `most` is 0.
    """
    if not most:
        return None
    pause = min(0.5 * 2.0**tries, 2.0)
    if not isinstance(exc, openai.APIStatusError):
        again = writing and tries < most and isinstance(exc.__cause__, _NOT_CONNECTED)
        return pause if again else None
    if exc.response.headers.get("x-should-retry") == "false" or exc.code == NO_QUOTA:
        return None
    asked = retry_after(exc.response)
    if exc.code == LOCKED:
        return pause if asked is None else max(asked, SHORTEST_WAIT)
    if writing and tries < most and exc.status_code in _DID_NOTHING:
        return 1.0 if asked is None else asked
    return None


def retry_after(response: httpx2.Response) -> float | None:
    """Return the seconds that a response asks to wait; None where it doesn't."""
    headers = response.headers
    for name, divisor in (("retry-after-ms", 1000), ("retry-after", 1)):
        with suppress(KeyError, ValueError):
            seconds = float(headers[name]) / divisor
            if math.isfinite(seconds):
                return max(0.0, seconds)
    return None
