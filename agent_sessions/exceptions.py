"""The errors of agent_sessions. Each message says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from django.core.exceptions import (
    ImproperlyConfigured,
    ObjectDoesNotExist,
    SynchronousOnlyOperation,
)

from agent_sessions.characters import printable


class AgentSessionError(Exception):
    """Base of every error that agent_sessions raises.

    Its text is one line of printable characters, whatever it quotes.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class InvalidBackend(AgentSessionError, ImproperlyConfigured):
    """The AGENT_SESSIONS setting names a backend that can't be built.

    `hint` says what to do about it and `id` is the system check's, of which
    docs/checks.md has the table.
    """

    def __init__(
        self, message: str, *, hint: str = "", id: str = "agent_sessions.E001"
    ) -> None:
        super().__init__(f"{message} {hint}".rstrip())
        self.message = message
        self.hint = hint
        self.id = id


class InvalidConsumer(AgentSessionError, TypeError):
    """A consumer was given what it can't use, or lacks what it needs."""


class MissingExtra(AgentSessionError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(
            f"{feature} needs an optional dependency. Install it with: "
            f'pip install "django-agent-sessions[{extra}]"'
        )
        self.extra = extra


@contextmanager
def extra(name: str, module: str, *, needed_by: str) -> Iterator[None]:
    """Raise MissingExtra, which names the extra, if an import in the block fails."""
    try:
        yield
    except ModuleNotFoundError as exc:
        # A dependency that the module itself lacks is no part of the extra.
        if (exc.name or "").partition(".")[0] != module:
            raise
        raise MissingExtra(needed_by, name) from exc


class SessionDoesNotExist(AgentSessionError, ObjectDoesNotExist):
    """There is no such session, or another user owns it; the error doesn't say which."""

    def __init__(self, session_id: str) -> None:
        super().__init__(
            f"Session {session_id!r} does not exist. Open it with the user that owns "
            "it, or choose another session id."
        )
        self.session_id = session_id


class InvalidBranch(AgentSessionError, ValueError):
    """A branch can't be made, switched to or deleted like that.

    A ValueError, as AdvancedSQLiteSession raises it.
    """


class BranchDoesNotExist(InvalidBranch, ObjectDoesNotExist):
    """The session has no branch of that name."""

    def __init__(self, session_id: str, branch: str) -> None:
        super().__init__(
            f"Branch {branch!r} does not exist in session {session_id!r}. Create it "
            "first, or leave branch out for the current one."
        )


class InvalidSessionId(AgentSessionError, ValueError):
    """The session id can't be stored."""


class InvalidOwner(AgentSessionError, ValueError):
    """The owner of a session must be a saved user that can be loaded here."""

    def __init__(self, reason: str = "it is anonymous or not saved") -> None:
        super().__init__(
            f"The session's user can't own it: {reason}. Give a saved user, or "
            "user=None for a session without an owner."
        )


class UserNotLoaded(InvalidOwner, SynchronousOnlyOperation):
    """A lazy user, such as `request.user`, was given in async code before its use."""

    def __init__(self) -> None:
        super().__init__(
            "it is not loaded yet, and loading it here would block the event loop; in "
            "an async view, give user=await request.auser()"
        )


class BlockingCall(AgentSessionError, SynchronousOnlyOperation):
    """A synchronous form was called in async code; nothing was done."""

    def __init__(self, blocking: str, awaited: str) -> None:
        super().__init__(
            f"{blocking} would block the event loop. In async code, call await "
            f"{awaited}."
        )


class InvalidItem(AgentSessionError, ValueError):
    """An item can't be stored as JSON; nothing of its batch was written."""


class InvalidLimit(AgentSessionError, ValueError):
    """A limit is neither None nor a whole number of 0 or more."""

    def __init__(self, limit: Any) -> None:
        super().__init__(
            f"limit must be None (everything) or a whole number of 0 or more, not "
            f"{limit!r}."
        )


class SessionClosed(AgentSessionError, RuntimeError):
    """The session was closed. A RuntimeError, as the SDK's classes raise it."""

    def __init__(self, kind: str) -> None:
        super().__init__(f"This {kind} is closed. Open another one.")


class StorageError(AgentSessionError):
    """The store could not be read or written; nothing was half-written.

    `number` is MySQL's or MariaDB's own number of what it refused.
    """

    number: int | None = None


class StoreUnavailable(StorageError):
    """The store didn't answer. A write has arrived whole, or not at all."""


class StoreRefused(StorageError):
    """The store doesn't take our credentials, or these don't allow the operation."""


class StoreReadOnly(StorageError):
    """The store takes no writes; nothing was written."""


class StoreFull(StorageError):
    """The store has no room for more; nothing was written."""


class WrongKeyType(StorageError):
    """A session's key holds something other than a history, which was not changed."""


class StoreBusy(StorageError):
    """The store asks to wait; nothing was written. `retry_after` is in seconds, or None."""

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class HistoryGone(StorageError):
    """The store no longer has the history that the session's row names."""


class PartlyWritten(StorageError):
    """A write failed midway, and a part of it could not be removed again.

    The first `stored` items of the batch are there; `unsure` holds the numbers, from
    0, of those that may be there.
    """

    def __init__(self, message: str, *, stored: int, unsure: range) -> None:
        super().__init__(message)
        self.stored = stored
        self.unsure = unsure


class EncryptionError(StorageError):
    """Encrypted or signed contents can't be opened; nothing was changed."""


class ScanLimitReached(AgentSessionError, RuntimeError):
    """A read would look at more stored items than it may.

    A RuntimeError, as the SDK's EncryptedSession raises it.
    """

    def __init__(self) -> None:
        super().__init__(
            "max_scan_items stored items are too few to read this. Raise it, or clear "
            "what is old."
        )


class UnknownEncryptionKey(EncryptionError):
    """Items are encrypted with a key that isn't configured; `key_id` names it."""

    def __init__(self, session_id: str, key_id: str, known: list[str]) -> None:
        super().__init__(
            f"Session {session_id!r} has items under the encryption key {key_id!r}, "
            f"which is not among the keys that are configured ({', '.join(known)}). "
            "Add that key behind the others; nothing was changed."
        )
        self.session_id = session_id
        self.key_id = key_id


class UnacceptedEnvelope(UnknownEncryptionKey):
    """Items are in envelopes of the SDK's, which are not accepted here."""

    def __init__(self, session_id: str, key_id: str) -> None:
        EncryptionError.__init__(
            self,
            f"Session {session_id!r} has items that the SDK's EncryptedSession wrote. "
            "These are bound to the session id alone: whoever writes to the store can "
            "put them in from elsewhere. If they are yours, set "
            "accept_sdk_envelopes=True, and rotate the keys; nothing was changed.",
        )
        self.session_id = session_id
        self.key_id = key_id


class RetiredEncryptionKey(EncryptionError):
    """The key to write with was retired; nothing was written. `key_id` names it."""

    def __init__(self, alias: str, key_id: str) -> None:
        super().__init__(
            f"The first encryption key of {alias!r} is {key_id!r}, which "
            "rotate_agent_session_keys has retired: newer keys have taken its place. "
            "Nothing was written. Give this process the current keys, the newest first, "
            "and restart it; to write with the retired key again, call "
            f"manage.py rotate_agent_session_keys --reinstate {key_id}."
        )
        self.key_id = key_id


class InvalidEncryptionKey(AgentSessionError, ValueError):
    """An encryption key is invalid; the message doesn't quote it."""


class SessionBusy(AgentSessionError):
    """Another run of the session is still going; `run_id` names it."""

    def __init__(self, run_id: str) -> None:
        super().__init__(
            f"The session is busy with run {run_id!r}. Wait for its end or abort it, "
            "then start again."
        )
        self.run_id = run_id


class ShuttingDown(AgentSessionError):
    """This process ends and takes no new runs; another one does."""

    def __init__(self) -> None:
        super().__init__(
            "This process is shutting down and starts no more runs. Try again: another "
            "process answers."
        )


class RunFailed(AgentSessionError):
    """A run ended without an answer; `run_id` names it and `code` says why."""

    def __init__(self, run_id: str, code: str) -> None:
        super().__init__(
            f"Run {run_id!r} failed: {code}. Its row has the code, and the logger "
            "agent_sessions.runs the error's class."
        )
        self.run_id = run_id
        self.code = code


class RunStopped(RunFailed):
    """A run was stopped before it had an answer."""

    def __init__(self, run_id: str) -> None:
        super().__init__(run_id, "cancelled")


class LeaseLost(AgentSessionError):
    """A run wrote after it had lost its lease; nothing was written."""

    def __init__(self) -> None:
        super().__init__(
            "This run has lost its lease on the session, because it was silent for too "
            "long or the session was cleared. Nothing was written; start a new run."
        )


class InterruptsPending(AgentSessionError):
    """A paused run waits for approval, so the session takes no new message."""


class RunPaused(InterruptsPending):
    """A run waits for an approval; `interrupts` are the calls, as AG-UI names them."""

    def __init__(self, run_id: str, interrupts: list[dict[str, Any]]) -> None:
        super().__init__(
            f"Run {run_id!r} waits until {len(interrupts)} tool calls are approved or "
            "refused. Answer them in the conversation."
        )
        self.run_id = run_id
        self.interrupts = interrupts


class UnknownMessage(AgentSessionError):
    """The current branch has no such message of the user to ask again."""


class BranchesUnsupported(AgentSessionError):
    """The session's store keeps one line of items and no branches."""


class UnknownInterrupt(AgentSessionError):
    """The answer doesn't match the approvals that are open."""


class UnreadableState(AgentSessionError):
    """A paused run's state can't be restored; the approval was withdrawn."""


class InterruptExpired(AgentSessionError):
    """The approval was not given in time."""


class InvalidApproval(AgentSessionError):
    """A stored approval isn't the one that was asked for; nothing was done."""

    def __init__(self, run_id: str) -> None:
        super().__init__(
            f"What is stored of the approval that run {run_id!r} waits for was changed, "
            "is another run's, or was answered before. Nothing was done; ask again."
        )
        self.run_id = run_id
