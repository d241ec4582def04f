"""Usage on a session: AdvancedSQLiteSession's three methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from agents import AgentsException

from agent_sessions.backends.database import usage
from agent_sessions.memory.base import blocking
from agent_sessions.memory.branches import BranchingSession, SyncBranchingSession
from agent_sessions.reports import guard_public_methods
from agent_sessions.usage import Spent, model_of, recorded_as, trace_of

if TYPE_CHECKING:
    from agents import RunResult, RunResultStreaming


@guard_public_methods
class UsageSession(BranchingSession):
    """A session that knows what its runs used, by turn and branch.

    The answers speak of turns that are there; the counters on the session's row hold
    everything that was ever used.
    """

    @property
    def sync(self) -> SyncUsageSession:
        """The same session for views and shells: no event loop is involved."""
        return SyncUsageSession(self)

    async def store_run_usage(self, result: RunResult | RunResultStreaming) -> None:
        """Record what a run used for the last turn of the current branch.

        Once more for the same turn, it replaces what was recorded before. A run of the
        run manager or with SessionHooks is recorded already and isn't counted twice.
        """
        run = finished(result)
        if run is not None:
            await self._backend.achange(
                self.key, lambda branches: usage.store(branches, run)
            )

    async def get_session_usage(
        self, branch_id: str | None = None
    ) -> dict[str, int] | None:
        """Sum up all branches, or one; None where nothing is recorded.

        Keys: requests, input_tokens, output_tokens, total_tokens, total_turns.
        """
        return await self._backend.aask(
            self.key, lambda branches: usage.session_usage(branches, branch_id)
        )

    async def get_turn_usage(
        self, user_turn_number: int | None = None, branch_id: str | None = None
    ) -> list[dict[str, Any]] | dict[str, Any]:
        """Return what one turn used, {} where nothing is recorded, or list all turns.

        Keys: requests, input_tokens, output_tokens, total_tokens,
        input_tokens_details, output_tokens_details, and in the list user_turn_number.
        """
        return await self._backend.aask(
            self.key,
            lambda branches: usage.turn_usage(branches, user_turn_number, branch_id),
        )


@guard_public_methods
@blocking
class SyncUsageSession(SyncBranchingSession):
    """The synchronous face of a session that knows what its runs used."""

    _session: UsageSession

    def store_run_usage(self, result: RunResult | RunResultStreaming) -> None:
        """See UsageSession.store_run_usage()."""
        run = finished(result)
        if run is not None:
            self._change(lambda branches: usage.store(branches, run))

    def get_session_usage(self, branch_id: str | None = None) -> dict[str, int] | None:
        """See UsageSession.get_session_usage()."""
        return self._ask(lambda branches: usage.session_usage(branches, branch_id))

    def get_turn_usage(
        self, user_turn_number: int | None = None, branch_id: str | None = None
    ) -> list[dict[str, Any]] | dict[str, Any]:
        """See UsageSession.get_turn_usage()."""
        return self._ask(
            lambda branches: usage.turn_usage(branches, user_turn_number, branch_id)
        )


def finished(result: RunResult | RunResultStreaming) -> usage.Finished | None:
    """Take out of a result what its row keeps; None where it counted nothing."""
    context = result.context_wrapper
    counted: Any = context.usage
    if counted is None:
        return None
    try:
        agent = getattr(result, "last_agent", None)
    except AgentsException:
        # The caller has released it.
        agent = None
    return usage.Finished(
        Spent.of(counted),
        agent_name="" if agent is None else agent.name,
        model="" if agent is None else model_of(agent),
        trace_id=trace_of(getattr(result, "trace", None)),
        run_id=recorded_as(context),
    )
