"""Rows about histories whose session may be gone, and about keys."""

from __future__ import annotations

from django.db import models
from django.utils import timezone
from django.utils.translation import gettext_lazy as _

from agent_sessions.fields import ExactCharField, WideCharField


class HistoryKey(models.Model):
    """A row about the history of a session whose own row may be gone."""

    backend = ExactCharField(_("backend"), max_length=64)
    session_id = ExactCharField(_("session id"), max_length=255)
    # Text, not a foreign key: the user may be deleted. Empty means no owner.
    owner = ExactCharField(_("owner"), max_length=255, blank=True)
    created_at = models.DateTimeField(_("created"), default=timezone.now)

    class Meta:
        abstract = True

    def __str__(self) -> str:
        return f"{self.session_id} in {self.backend}"


class PendingClear(HistoryKey):
    """A history that is to be removed from a store that could not be reached."""

    remote_id = ExactCharField(_("remote id"), max_length=255, blank=True)
    tried_at = models.DateTimeField(_("last tried"), null=True, blank=True)
    attempts = models.PositiveIntegerField(_("attempts"), default=0)
    error_code = WideCharField(_("error code"), max_length=64, blank=True)

    class Meta:
        verbose_name = _("pending clear")
        verbose_name_plural = _("pending clears")


class SessionSecret(HistoryKey):
    """The key of one encrypted session, itself encrypted: without it nothing opens."""

    key_id = models.CharField(_("key id"), max_length=64)
    wrapped = models.TextField(_("wrapped key"))

    class Meta:
        verbose_name = _("session secret")
        verbose_name_plural = _("session secrets")
        constraints = (
            models.UniqueConstraint(
                fields=("backend", "session_id", "owner"),
                name="agent_sessions_unique_secret",
            ),
        )


class KeyUse(models.Model):
    """The use of one master key by an encrypted backend: who may write with it."""

    backend = ExactCharField(_("backend"), max_length=64)
    key_id = ExactCharField(_("key id"), max_length=64)
    # Counted up by each process that may write with it for `seconds` from then on.
    takings = models.BigIntegerField(_("times taken"), default=0)
    seconds = models.FloatField(_("seconds"), default=0)
    # Who did so last, for people: host and process id.
    holder = models.CharField(_("last taken by"), max_length=255, blank=True)
    taken_at = models.DateTimeField(_("last taken"), default=timezone.now)
    # From then on nobody may.
    retired_at = models.DateTimeField(_("retired"), null=True, blank=True)

    class Meta:
        verbose_name = _("use of a key")
        verbose_name_plural = _("uses of keys")
        constraints = (
            models.UniqueConstraint(
                fields=("backend", "key_id"), name="agent_sessions_unique_key_use"
            ),
        )

    def __str__(self) -> str:
        return f"{self.key_id} in {self.backend}"
