"""The session over the ORM: branches, turns, undo and usage, without any setting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, cast

from agents import AgentsException

from agent_sessions.backends.base import make_key
from agent_sessions.backends.database import branches as forks
from agent_sessions.backends.database import rewriting, turns, usage
from agent_sessions.backends.database.branches import Branches
from agent_sessions.backends.keys import check_branch, check_limit
from agent_sessions.handler import sessions
from agent_sessions.items import encode_batch
from agent_sessions.memory.base import (
    BackendSession,
    SyncSession,
    stores_plain_items,
    twin,
)
from agent_sessions.models import MAIN_BRANCH
from agent_sessions.reports import guard_public_methods, guarded, unwrapped
from agent_sessions.usage import Spent, model_of, recorded_as, trace_of

if TYPE_CHECKING:
    from agents import RunResult, RunResultStreaming
    from agents.items import TResponseInputItem
    from django.contrib.auth.base_user import AbstractBaseUser
    from django.contrib.auth.models import AnonymousUser

    from agent_sessions.backends.database import DatabaseBackend
    from agent_sessions.memory.base import Settings, Wrapper

P = ParamSpec("P")
T = TypeVar("T")


@guard_public_methods
class DjangoSession(BackendSession):
    """A conversation in a Django database: `DjangoSession("user_123")`.

    `user` owns it; None means a session without an owner. `database` is an alias of
    DATABASES, else the router's choice. `branch` names a branch to work on, else the
    session's current one, which the next request goes on with.

    Names, arguments and results are those of the SDK's AdvancedSQLiteSession, and its
    ValueErrors are ours too (InvalidBranch). What a session used is told of the turns
    that are there; the counters on its row hold everything that was ever used.
    """

    def __init__(
        self,
        session_id: str,
        *,
        user: AbstractBaseUser | AnonymousUser | None = None,
        database: str | None = None,
        branch: str | None = None,
        session_settings: Settings = None,
    ) -> None:
        super().__init__(
            sessions.database(database),
            make_key(session_id, user, branch=branch),
            session_settings=session_settings,
        )

    @property
    def sync(self) -> SyncDjangoSession:
        """The same session for views and shells: no event loop is involved."""
        return SyncDjangoSession(self)

    @unwrapped
    async def get_items(
        self,
        limit: int | None = None,
        branch_id: str | None = None,
        *,
        wrapper: Wrapper = None,
    ) -> list[TResponseInputItem]:
        """Read the newest items of the current branch, or of another."""
        if branch_id is None:
            return await super().get_items(limit, wrapper=wrapper)
        check_branch(branch_id)
        other = BackendSession.from_key(
            self.backend,
            replace(self.key, branch=branch_id),
            session_settings=self.session_settings,
        )
        return await other.get_items(limit, wrapper=wrapper)

    async def clear_session(self, *, wrapper: Wrapper = None) -> None:
        """Remove every item, of all branches, and go back to "main"."""
        await super().clear_session(wrapper=wrapper)
        self._keep_to(MAIN_BRANCH)

    async def create_branch_from_turn(
        self, turn_number: int, branch_name: str | None = None
    ) -> str:
        """Fork before a user's turn and switch to the new branch; return its name.

        Nothing is copied. Raises InvalidBranch where the turn isn't there or the name
        was used before.
        """
        return await self._fork(Branches.fork_before_turn, turn_number, branch_name)

    async def create_branch_from_content(
        self, search_term: str, branch_name: str | None = None
    ) -> str:
        """Fork before the first user's turn that holds a term."""
        return await self._fork(
            lambda branches: branches.fork_before_turn(
                turns.first_match(branches, search_term), branch_name
            )
        )

    async def fork(self, at: int, branch_name: str | None = None) -> str:
        """Fork after turn `at` and switch to the new branch; 0 keeps no turn."""
        return await self._fork(forks.fork_at, at, branch_name)

    async def undo_turn(self) -> int | None:
        """Take back the last turn, calls and outputs together; return its number.

        Return None if there is no turn. The rows are kept on an archived branch, which
        list_archived() names and restore_branch() brings back.
        """
        return await self._change(forks.undo_turn)

    async def restore_branch(self, archived: str) -> str:
        """Make what an undo took away current again, on a new branch."""
        return await self._fork(forks.restore, archived)

    async def list_archived(self) -> list[str]:
        """Name the archived branches, oldest first."""
        return await self._ask(Branches.archived_names)

    async def switch_to_branch(self, branch_id: str) -> None:
        """Make a branch the current one. Raises BranchDoesNotExist."""
        await self._change(Branches.switch, branch_id)
        self._keep_to(branch_id)

    async def delete_branch(self, branch_id: str, force: bool = False) -> None:
        """Delete a branch but for what others grew from; its name stays reserved.

        `force` deletes the current branch too and switches to "main".
        """
        await self._change(Branches.delete, branch_id, force=force)
        if self.key.branch == branch_id:
            self._keep_to(MAIN_BRANCH)

    async def list_branches(self) -> list[dict[str, Any]]:
        """Describe the branches.

        Each has branch_id, message_count, user_turns, is_current and created_at.
        """
        return await self._ask(Branches.listing)

    async def get_conversation_turns(
        self, branch_id: str | None = None, *, after: int = 0, limit: int | None = None
    ) -> list[dict[str, Any]]:
        """List user turns whose number is greater than `after`.

        Each has turn, content, full_content, timestamp and can_branch.
        """
        check_limit(limit)
        return await self._ask(
            turns.conversation_turns, branch_id, after=after, limit=limit
        )

    async def find_turns_by_content(
        self,
        search_term: str,
        branch_id: str | None = None,
        *,
        after: int = 0,
        limit: int | None = None,
    ) -> list[dict[str, Any]]:
        """List the user turns whose text holds a term, in any case of ASCII letters."""
        check_limit(limit)
        return await self._ask(
            turns.find_turns, search_term, branch_id, after=after, limit=limit
        )

    async def get_conversation_by_turns(
        self, branch_id: str | None = None
    ) -> dict[int, list[dict[str, str | None]]]:
        """Map turn numbers to the kinds of their items and the tools they name."""
        return await self._ask(turns.conversation_by_turns, branch_id)

    async def get_tool_usage(
        self, branch_id: str | None = None
    ) -> list[tuple[str | None, int, int]]:
        """Count calls: (tool name, calls, turn number)."""
        return await self._ask(turns.tool_usage, branch_id)

    async def store_run_usage(self, result: RunResult | RunResultStreaming) -> None:
        """Record what a run used for the last turn of the current branch.

        Once more for the same turn, it replaces what was recorded before. A run of the
        run manager or with SessionHooks is recorded already and isn't counted twice.
        """
        run = finished(result)
        if run is not None:
            await self._change(usage.store, run)

    async def get_session_usage(
        self, branch_id: str | None = None
    ) -> dict[str, int] | None:
        """Sum up all branches, or one; None where nothing is recorded.

        Keys: requests, input_tokens, output_tokens, total_tokens, total_turns.
        """
        return await self._ask(usage.session_usage, branch_id)

    async def get_turn_usage(
        self, user_turn_number: int | None = None, branch_id: str | None = None
    ) -> list[dict[str, Any]] | dict[str, Any]:
        """Return what one turn used, {} where nothing is recorded, or list all turns.

        Keys: requests, input_tokens, output_tokens, total_tokens,
        input_tokens_details, output_tokens_details, and in the list user_turn_number.
        """
        return await self._ask(usage.turn_usage, user_turn_number, branch_id)

    # The SDK's private hooks for crash-safe compaction, which
    # OpenAIResponsesCompactionSession asks the session that it wraps for
    # (agents/memory/openai_responses_compaction_session.py, 0.24). Without them it
    # reads, clears and adds, and a crash between loses the history. A test pins their
    # names, and where they change the session works on without them.

    @guarded
    async def _get_compaction_snapshot(
        self, limit: int, *, prune_prefix: Callable[[Any], bool] | None = None
    ) -> Any:
        """Read the newest `limit` items, and how to replace them.

        Returns None where it can't be done safely.

        What lies before an unreadable row stays where it is, and the row too.
        `prune_prefix` names items that a wrapper has expired and hides anyway: they are
        left where they are.
        """
        try:
            from agents.memory.session import _CompactionSnapshot as Snapshot
        except ImportError:
            return None
        if not stores_plain_items(self, DjangoSession):
            return None
        tail = await self._ask(rewriting.read_tail, limit)
        if tail is None:
            return None

        async def replace_suffix(start: int, output: list[TResponseInputItem]) -> bool:
            batch = encode_batch(output)
            return await self._change(rewriting.swap_tail, tail, start, batch)

        items: list[Any] = list(tail.items)
        return Snapshot(items, tail.complete, replace_suffix)

    @guarded
    async def _atomic_replace_items(self, items: list[TResponseInputItem]) -> bool:
        """Replace the whole history in one transaction."""
        if not stores_plain_items(self, DjangoSession):
            return False
        batch = encode_batch(items)
        return await self._change(rewriting.swap_all, batch)

    async def _ask(
        self,
        question: Callable[Concatenate[Branches, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        backend = cast("DatabaseBackend", self.backend)
        return await self._call(
            backend.ask, backend.aask, lambda b: question(b, *args, **kwargs)
        )

    async def _change(
        self,
        change: Callable[Concatenate[Branches, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        backend = cast("DatabaseBackend", self.backend)
        return await self._call(
            backend.change, backend.achange, lambda b: change(b, *args, **kwargs)
        )

    async def _fork(
        self,
        change: Callable[Concatenate[Branches, P], str],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> str:
        name = await self._change(change, *args, **kwargs)
        self._keep_to(name)
        return name

    def _keep_to(self, branch_id: str) -> None:
        # Only a session that was opened on a branch of its own remembers one.
        if self.key.branch is not None:
            self.key = replace(self.key, branch=branch_id)


@guard_public_methods
class SyncDjangoSession(SyncSession):
    """The synchronous face of a DjangoSession."""

    # Another signature than the base's, which has no branch_id.
    get_items: Callable[..., list[TResponseInputItem]] = twin(DjangoSession.get_items)
    clear_session = twin(DjangoSession.clear_session)
    create_branch_from_turn = twin(DjangoSession.create_branch_from_turn)
    create_branch_from_content = twin(DjangoSession.create_branch_from_content)
    fork = twin(DjangoSession.fork)
    undo_turn = twin(DjangoSession.undo_turn)
    restore_branch = twin(DjangoSession.restore_branch)
    list_archived = twin(DjangoSession.list_archived)
    switch_to_branch = twin(DjangoSession.switch_to_branch)
    delete_branch = twin(DjangoSession.delete_branch)
    list_branches = twin(DjangoSession.list_branches)
    get_conversation_turns = twin(DjangoSession.get_conversation_turns)
    find_turns_by_content = twin(DjangoSession.find_turns_by_content)
    get_conversation_by_turns = twin(DjangoSession.get_conversation_by_turns)
    get_tool_usage = twin(DjangoSession.get_tool_usage)
    store_run_usage = twin(DjangoSession.store_run_usage)
    get_session_usage = twin(DjangoSession.get_session_usage)
    get_turn_usage = twin(DjangoSession.get_turn_usage)


def finished(result: RunResult | RunResultStreaming) -> usage.Finished | None:
    """Return what the row of a run keeps of its result, or None if nothing was counted."""
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
