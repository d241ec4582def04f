"""The directory of sessions, and what the database backend stores."""

from __future__ import annotations

import uuid
from typing import Any

from django.conf import settings
from django.db import models
from django.utils import timezone
from django.utils.translation import gettext_lazy as _

from agent_sessions.fields import (
    ExactCharField,
    RawTextField,
    WideCharField,
    WideTextField,
    cascade,
    detach,
)
from agent_sessions.managers import OwnedManager, StoredModel
from agent_sessions.models.keys import HistoryKey, KeyUse, PendingClear, SessionSecret
from agent_sessions.times import today

__all__ = [
    "LABEL_MARK",
    "MAIN_BRANCH",
    "AgentRun",
    "AgentSession",
    "Branch",
    "HistoryKey",
    "KeyUse",
    "PendingClear",
    "RunEvents",
    "SessionItem",
    "SessionSecret",
]

MAIN_BRANCH = "main"
# Stands in labels between a branch's name and its version, and in no name.
LABEL_MARK = "~"


class AgentSession(StoredModel):
    """One conversation: who owns it, where its items lie, what it has used."""

    owner_path = ""

    class State(models.TextChoices):
        IDLE = "idle", _("idle")
        RUNNING = "running", _("running")
        WAITING = "waiting", _("waiting for approval")

    # Whether its history was removed, so that deleting the row leaves nothing behind.
    history_is_cleared = False

    backend = ExactCharField(_("backend"), max_length=64, default="default")
    session_id = ExactCharField(_("session id"), max_length=255)
    user = models.ForeignKey(
        settings.AUTH_USER_MODEL,
        verbose_name=_("user"),
        on_delete=detach,
        related_name="agent_sessions",
        null=True,
        blank=True,
        # The owner's index below begins with this column.
        db_index=False,
    )
    title = WideCharField(_("title"), max_length=200, blank=True)
    metadata = models.JSONField(_("metadata"), default=dict, blank=True)
    branch = models.ForeignKey(
        "Branch",
        verbose_name=_("current branch"),
        on_delete=models.SET_NULL,
        related_name="+",
        null=True,
        blank=True,
    )
    # What the store itself calls the session, where it chooses the name.
    remote_id = ExactCharField(_("remote id"), max_length=255, blank=True)
    # Whether the store is being told to delete that: a crash in between forgets nothing.
    remote_deleting = models.BooleanField(_("remote deletion begun"), default=False)
    # Plain integers, as in the two models below: PostgreSQL parses the CHECK of each
    # Positive…Field anew at every update, which would take a tenth of an append.
    item_count = models.IntegerField(_("items"), default=0)
    requests = models.BigIntegerField(_("requests"), default=0)
    input_tokens = models.BigIntegerField(_("input tokens"), default=0)
    output_tokens = models.BigIntegerField(_("output tokens"), default=0)
    cached_tokens = models.BigIntegerField(_("cached tokens"), default=0)
    reasoning_tokens = models.BigIntegerField(_("reasoning tokens"), default=0)
    agent_name = WideCharField(_("last agent"), max_length=255, blank=True)
    state = models.CharField(
        _("state"), max_length=16, choices=State.choices, default=State.IDLE
    )
    run_id = ExactCharField(_("active run"), max_length=64, blank=True)
    run_owner = models.CharField(_("run's process"), max_length=64, blank=True)
    run_seen_at = models.DateTimeField(_("run last seen"), null=True, blank=True)
    # How its run is asked to stop, by whichever process: a mode of RunManager.stop().
    run_stop = models.CharField(_("stop asked"), max_length=16, blank=True)
    # When a process last said that it has listeners of a run that isn't its own.
    run_listened_at = models.DateTimeField(_("run last heard"), null=True, blank=True)
    fence = models.BigIntegerField(_("fencing number"), default=0)
    created_at = models.DateTimeField(_("created"), default=timezone.now)
    # Not indexed: every append changes it, and PostgreSQL would rewrite every index
    # entry of the row. Its day, see day_of(), changes once a day and orders lists.
    updated_at = models.DateTimeField(_("last activity"), default=timezone.now)
    active_on = models.DateField(_("last active on"), default=today)
    expires_at = models.DateTimeField(
        _("expires"), null=True, blank=True, db_index=True
    )
    # When its history was removed; its rows are still to be deleted, and nobody knows
    # its id.
    removed_at = models.DateTimeField(
        _("removed"), null=True, db_index=True, editable=False
    )

    objects = OwnedManager()

    class Meta:
        verbose_name = _("agent session")
        verbose_name_plural = _("agent sessions")
        # Who may see that there is a session may not see what was said in it.
        permissions = (
            ("read_agentsession", "Can read the messages of agent sessions"),
            ("clear_agentsession", "Can clear agent sessions"),
        )
        constraints = (
            # The id comes first: it is looked for by its beginning too.
            models.UniqueConstraint(
                fields=("session_id", "backend"), name="agent_sessions_unique_id"
            ),
        )
        indexes = (
            models.Index(
                fields=("user", "-active_on", "-id"), name="agent_sessions_by_owner"
            ),
            models.Index(fields=("-active_on", "-id"), name="agent_sessions_by_day"),
            models.Index(
                fields=("backend", "-active_on", "-id"), name="agent_sessions_by_store"
            ),
        )

    def __str__(self) -> str:
        # Not the title, which quotes the first message: logs and lists show this.
        return str(self.session_id)

    @staticmethod
    def new_id() -> str:
        """Make an id that can't be guessed."""
        return str(uuid.uuid4())


class Branch(StoredModel):
    """A line of a session's history; its items follow its parent's up to the fork."""

    owner_path = "session"

    session = models.ForeignKey(
        AgentSession,
        verbose_name=_("session"),
        on_delete=cascade,
        related_name="branches",
        # The unique constraint below begins with this column.
        db_index=False,
    )
    name = ExactCharField(_("name"), max_length=255, default=MAIN_BRANCH)
    # 0 for the branch of the name, also when deleted; another for what was replaced.
    version = models.BigIntegerField(_("version"), default=0, editable=False)
    parent = models.ForeignKey(
        "self",
        verbose_name=_("parent"),
        on_delete=models.CASCADE,
        related_name="children",
        null=True,
        blank=True,
    )
    fork_position = models.BigIntegerField(_("fork position"), null=True, blank=True)
    head = models.BigIntegerField(_("head"), default=0)
    turn = models.IntegerField(_("turn"), default=0)
    created_at = models.DateTimeField(_("created"), default=timezone.now)
    # An archived branch is neither listed nor written to. It keeps its name, and its
    # rows for the branches that grew from it.
    archived_at = models.DateTimeField(_("archived"), null=True, blank=True)
    # Whether it holds the rows that the doctor took out of its parent.
    is_quarantine = models.BooleanField(_("quarantine"), default=False, editable=False)

    objects = OwnedManager()

    class Meta:
        verbose_name = _("branch")
        verbose_name_plural = _("branches")
        constraints = (
            models.UniqueConstraint(
                fields=("session", "name", "version"),
                name="agent_sessions_unique_branch",
            ),
        )

    def __str__(self) -> str:
        return str(self.name)

    @property
    def label(self) -> str:
        """The name; of what has lost it, with a number that tells it from others."""
        return f"{self.name}{LABEL_MARK}{self.version}" if self.version else self.name

    @staticmethod
    def of_label(label: str) -> dict[str, Any]:
        """Return the columns that a label stands for."""
        name, _, version = label.rpartition(LABEL_MARK)
        if version.isdecimal():
            return {"name": name, "version": int(version)}
        return {"name": label, "version": 0}


class SessionItem(StoredModel):
    """One item of a history, as JSON text, with the columns drawn from it."""

    owner_path = "branch__session"

    branch = models.ForeignKey(
        Branch,
        verbose_name=_("branch"),
        on_delete=models.CASCADE,
        related_name="items",
        # The unique constraint below serves order, window and foreign key alike.
        db_index=False,
    )
    position = models.BigIntegerField(_("position"))
    turn = models.IntegerField(_("turn"), default=0)
    # Text, not JSONField: jsonb refuses NUL and lone surrogates and rewrites 1e22.
    data = RawTextField(_("data"))
    type = WideCharField(_("type"), max_length=64, blank=True)
    role = WideCharField(_("role"), max_length=32, blank=True)
    call_id = WideCharField(_("call id"), max_length=255, blank=True)
    tool_name = WideCharField(_("tool name"), max_length=255, blank=True)
    text = WideTextField(_("text"), blank=True)
    size = models.IntegerField(_("size in bytes"), default=0)
    created_at = models.DateTimeField(_("created"), default=timezone.now)

    objects = OwnedManager()

    class Meta:
        verbose_name = _("item")
        verbose_name_plural = _("items")
        constraints = (
            models.UniqueConstraint(
                fields=("branch", "position"), name="agent_sessions_unique_position"
            ),
        )

    def __str__(self) -> str:
        return f"{self.type or '?'} #{self.position}"


class AgentRun(StoredModel):
    """One run of an agent on a session: how it went and what it used."""

    owner_path = "session"

    class Status(models.TextChoices):
        RUNNING = "running", _("running")
        COMPLETED = "completed", _("completed")
        FAILED = "failed", _("failed")
        CANCELLED = "cancelled", _("cancelled")
        INTERRUPTED = "interrupted", _("interrupted")
        WAITING = "waiting", _("waiting for approval")

    session = models.ForeignKey(
        AgentSession,
        verbose_name=_("session"),
        on_delete=cascade,
        related_name="runs",
        # Indexes below begin with this column.
        db_index=False,
    )
    branch = models.ForeignKey(
        Branch,
        verbose_name=_("branch"),
        on_delete=models.SET_NULL,
        related_name="runs",
        null=True,
        blank=True,
    )
    run_id = ExactCharField(_("run id"), max_length=64)
    resumed_by = models.ForeignKey(
        "self",
        verbose_name=_("resumed by"),
        on_delete=models.SET_NULL,
        related_name="resumes",
        null=True,
        blank=True,
    )
    agent_name = WideCharField(_("agent"), max_length=255, blank=True)
    model = WideCharField(_("model"), max_length=255, blank=True)
    status = models.CharField(
        _("status"), max_length=16, choices=Status.choices, default=Status.RUNNING
    )
    started_at = models.DateTimeField(_("started"), default=timezone.now)
    finished_at = models.DateTimeField(_("finished"), null=True, blank=True)
    first_position = models.BigIntegerField(_("first item"), null=True, blank=True)
    last_position = models.BigIntegerField(_("last item"), null=True, blank=True)
    turn = models.PositiveIntegerField(_("turn"), default=0)
    # The key of the user message that opens the turn, or of turn 0's first item. A
    # foreign key would slow removals down; a key that leads nowhere is a turn gone.
    turn_item = models.BigIntegerField(_("turn's message"), null=True, blank=True)
    requests = models.PositiveIntegerField(_("requests"), default=0)
    input_tokens = models.PositiveBigIntegerField(_("input tokens"), default=0)
    output_tokens = models.PositiveBigIntegerField(_("output tokens"), default=0)
    cached_tokens = models.PositiveBigIntegerField(_("cached tokens"), default=0)
    reasoning_tokens = models.PositiveBigIntegerField(_("reasoning tokens"), default=0)
    total_tokens = models.PositiveBigIntegerField(_("total tokens"), default=0)
    usage = models.JSONField(_("usage details"), default=dict, blank=True)
    # Under which ids clients know what it stored: see runs/naming.py.
    message_ids = models.JSONField(_("message ids"), default=list, editable=False)
    error_code = WideCharField(_("error code"), max_length=64, blank=True)
    trace_id = WideCharField(_("trace id"), max_length=64, blank=True)
    # What a paused run waits for and goes on from, sealed for it: see approvals.py.
    state = WideTextField(_("run state"), blank=True)
    sdk_version = WideCharField(_("SDK version"), max_length=32, blank=True)
    # For queries: the time that counts is sealed too.
    expires_at = models.DateTimeField(_("approval expires"), null=True, blank=True)

    objects = OwnedManager()

    class Meta:
        verbose_name = _("agent run")
        verbose_name_plural = _("agent runs")
        constraints = (
            models.UniqueConstraint(
                fields=("run_id", "session"), name="agent_sessions_unique_run"
            ),
        )
        indexes = (
            models.Index(
                fields=("status", "-started_at", "-id"),
                name="agent_sessions_runs_by_state",
            ),
            models.Index(
                fields=("session", "first_position"), name="agent_sessions_runs_by_item"
            ),
            models.Index(fields=("session", "id"), name="agent_sessions_runs_in_order"),
        )

    def __str__(self) -> str:
        return str(self.run_id)


class RunEvents(StoredModel):
    """Some events of a run in their order: what clients were told, to tell it again."""

    owner_path = "run__session"

    run = models.ForeignKey(
        AgentRun,
        verbose_name=_("run"),
        on_delete=cascade,
        related_name="events",
        # The unique constraint below begins with this column.
        db_index=False,
    )
    # The numbers of the first and the last one; none in between is left out.
    first = models.BigIntegerField(_("first event"))
    last = models.BigIntegerField(_("last event"))
    # JSON, sealed for the run and the numbers: see runs/event_rows.py.
    body = WideTextField(_("events"))
    written_at = models.DateTimeField(_("written"), default=timezone.now, db_index=True)

    objects = OwnedManager()

    class Meta:
        verbose_name = _("events of a run")
        verbose_name_plural = _("events of runs")
        constraints = (
            models.UniqueConstraint(
                fields=("run", "first"), name="agent_sessions_unique_events"
            ),
        )

    def __str__(self) -> str:
        return f"{self.first} to {self.last}"
