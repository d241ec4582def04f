"""Tell by the database's clock whether a lease is still held.

Hosts that share a database don't share a clock. So leases and claims are written and
judged in statements, by the one clock that all of them see.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from django.db.models import BooleanField, DateTimeField, ExpressionWrapper, Func, Q

from agent_sessions.backends.processes import is_dead
from agent_sessions.models import AgentSession

# A run that has been silent for longer than this has died.
RUN_SILENCE = timedelta(seconds=60)


class DatabaseNow(Func):
    """The moment by the database's clock, for columns that nobody is shown.

    Unlike `Now()` it depends on no connection's time zone, and is not the moment at
    which a statement began that then waited for a row.
    """

    template = "CLOCK_TIMESTAMP()"
    output_field = DateTimeField()

    def as_sqlite(self, compiler: Any, connection: Any, **context: Any) -> Any:
        moment = "STRFTIME('%%%%Y-%%%%m-%%%%d %%%%H:%%%%M:%%%%f', 'NOW')"
        return self.as_sql(compiler, connection, template=moment, **context)

    def as_mysql(self, compiler: Any, connection: Any, **context: Any) -> Any:
        return self.as_sql(compiler, connection, template="UTC_TIMESTAMP(6)", **context)


def is_silent(column: str, silence: timedelta) -> Q:
    """Return the condition that a moment is further away than `silence`, or is none.

    A moment to come counts too: a clock that was set back has left it.
    """
    return (
        Q(**{f"{column}__isnull": True})
        | Q(**{f"{column}__lt": DatabaseNow() - silence})
        | Q(**{f"{column}__gt": DatabaseNow() + silence})
    )


def judged(rows: Any, silence: timedelta = RUN_SILENCE) -> Any:
    """Return the rows of sessions with what is_over() needs to know."""
    silent = is_silent("run_seen_at", silence)
    return rows.annotate(
        run_is_silent=ExpressionWrapper(silent, output_field=BooleanField())
    )


def is_over(row: Any) -> bool:
    """Return whether the run that a row of judged() names has ended without a word."""
    return bool(row.run_is_silent) or is_dead(row.run_owner)


def holds_a_run(row: AgentSession) -> bool:
    """Return whether a run that is alive holds a session, as its row says now."""
    if not row.run_id:
        return False
    rows = AgentSession.objects.using(row._state.db).filter(pk=row.pk)
    now = judged(rows.exclude(run_id="")).first()
    return now is not None and not is_over(now)
