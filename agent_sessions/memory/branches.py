"""Branches, turns and undo on a session: AdvancedSQLiteSession's interface and more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

from agent_sessions.backends.arguments import check_branch, check_limit
from agent_sessions.backends.database import turns, undo
from agent_sessions.backends.database.branches import Branches
from agent_sessions.memory.base import BackendSession, SyncSession, blocking
from agent_sessions.models import MAIN_BRANCH
from agent_sessions.reports import guard_public_methods, unwrapped

if TYPE_CHECKING:
    from agents.items import TResponseInputItem
    from agents.run_context import RunContextWrapper

    from agent_sessions.backends.database import DatabaseBackend

T = TypeVar("T")


@guard_public_methods
class BranchingSession(BackendSession):
    """A session whose history can fork.

    Names, arguments and results are those of the SDK's AdvancedSQLiteSession, and its
    ValueErrors are ours too (InvalidBranch). The current branch is the session's, in
    the database, so that the next request goes on with it; a session opened with
    `branch=` keeps to its own.
    """

    @property
    def sync(self) -> SyncBranchingSession:
        """The same session for views and shells: no event loop is involved."""
        return SyncBranchingSession(self)

    @unwrapped
    async def get_items(
        self,
        limit: int | None = None,
        branch_id: str | None = None,
        *,
        wrapper: RunContextWrapper[Any] | None = None,
    ) -> list[TResponseInputItem]:
        """Read the newest items of the current branch, or of another."""
        if branch_id is not None:
            return await _on_branch(self, branch_id).get_items(limit, wrapper=wrapper)
        return await super().get_items(limit, wrapper=wrapper)

    async def clear_session(
        self, *, wrapper: RunContextWrapper[Any] | None = None
    ) -> None:
        """Remove every item, of all branches, and go back to "main"."""
        await super().clear_session(wrapper=wrapper)
        _keep_to(self, MAIN_BRANCH)

    async def create_branch_from_turn(
        self, turn_number: int, branch_name: str | None = None
    ) -> str:
        """Fork before a user's turn and switch to the new branch; give its name.

        Nothing is copied. Raises InvalidBranch where the turn isn't there or the name
        was used before.
        """
        return await self._fork(
            lambda branches: branches.fork_before_turn(turn_number, branch_name)
        )

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
        return await self._fork(
            lambda branches: undo.fork_at(branches, at, branch_name)
        )

    async def undo_turn(self) -> int | None:
        """Take back the last turn, calls and outputs together; give its number.

        None where there is no turn. The rows are kept on an archived branch, which
        list_archived() names and restore_branch() brings back.
        """
        return await self._backend.achange(self.key, undo.undo_turn)

    async def restore_branch(self, archived: str) -> str:
        """Make what an undo took away current again, on a new branch."""
        return await self._fork(lambda branches: undo.restore(branches, archived))

    async def list_archived(self) -> list[str]:
        """Name the archived branches, oldest first."""
        return await self._backend.aask(self.key, Branches.archived_names)

    async def switch_to_branch(self, branch_id: str) -> None:
        """Make a branch the current one. Raises BranchDoesNotExist."""
        await self._backend.achange(
            self.key, lambda branches: branches.switch(branch_id)
        )
        _keep_to(self, branch_id)

    async def delete_branch(self, branch_id: str, force: bool = False) -> None:
        """Delete a branch but for what others grew from; its name stays reserved.

        `force` deletes the current branch too and switches to "main".
        """
        await self._backend.achange(
            self.key, lambda branches: branches.delete(branch_id, force=force)
        )
        if self.key.branch == branch_id:
            _keep_to(self, MAIN_BRANCH)

    async def list_branches(self) -> list[dict[str, Any]]:
        """Describe the branches.

        Each has branch_id, message_count, user_turns, is_current and created_at.
        """
        return await self._backend.aask(self.key, Branches.listing)

    async def get_conversation_turns(
        self,
        branch_id: str | None = None,
        *,
        after: int = 0,
        limit: int | None = None,
    ) -> list[dict[str, Any]]:
        """List user turns whose number is greater than `after`.

        Each has turn, content, full_content, timestamp and can_branch.
        """
        check_limit(limit)
        return await self._backend.aask(
            self.key,
            lambda branches: turns.conversation_turns(
                branches, branch_id, after=after, limit=limit
            ),
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
        return await self._backend.aask(
            self.key,
            lambda branches: turns.find_turns(
                branches, search_term, branch_id, after=after, limit=limit
            ),
        )

    async def get_conversation_by_turns(
        self, branch_id: str | None = None
    ) -> dict[int, list[dict[str, str | None]]]:
        """Map turn numbers to the kinds of their items and the tools they name."""
        return await self._backend.aask(
            self.key, lambda branches: turns.conversation_by_turns(branches, branch_id)
        )

    async def get_tool_usage(
        self, branch_id: str | None = None
    ) -> list[tuple[str | None, int, int]]:
        """Count calls: (tool name, calls, turn number)."""
        return await self._backend.aask(
            self.key, lambda branches: turns.tool_usage(branches, branch_id)
        )

    @property
    def _backend(self) -> DatabaseBackend:
        return cast("DatabaseBackend", self.backend)

    async def _fork(self, change: Callable[[Branches], str]) -> str:
        name = await self._backend.achange(self.key, change)
        _keep_to(self, name)
        return name


@guard_public_methods
@blocking
class SyncBranchingSession(SyncSession):
    """The synchronous face of a session whose history can fork."""

    _session: BranchingSession

    @unwrapped
    def get_items(
        self, limit: int | None = None, branch_id: str | None = None
    ) -> list[TResponseInputItem]:
        """See BranchingSession.get_items()."""
        if branch_id is not None:
            return _on_branch(self._session, branch_id).sync.get_items(limit)
        return super().get_items(limit)

    def clear_session(self) -> None:
        """See BranchingSession.clear_session()."""
        super().clear_session()
        _keep_to(self._session, MAIN_BRANCH)

    def create_branch_from_turn(
        self, turn_number: int, branch_name: str | None = None
    ) -> str:
        """See BranchingSession.create_branch_from_turn()."""
        return self._fork(
            lambda branches: branches.fork_before_turn(turn_number, branch_name)
        )

    def create_branch_from_content(
        self, search_term: str, branch_name: str | None = None
    ) -> str:
        """See BranchingSession.create_branch_from_content()."""
        return self._fork(
            lambda branches: branches.fork_before_turn(
                turns.first_match(branches, search_term), branch_name
            )
        )

    def fork(self, at: int, branch_name: str | None = None) -> str:
        """See BranchingSession.fork()."""
        return self._fork(lambda branches: undo.fork_at(branches, at, branch_name))

    def undo_turn(self) -> int | None:
        """See BranchingSession.undo_turn()."""
        return self._change(undo.undo_turn)

    def restore_branch(self, archived: str) -> str:
        """See BranchingSession.restore_branch()."""
        return self._fork(lambda branches: undo.restore(branches, archived))

    def list_archived(self) -> list[str]:
        """See BranchingSession.list_archived()."""
        return self._ask(Branches.archived_names)

    def switch_to_branch(self, branch_id: str) -> None:
        """See BranchingSession.switch_to_branch()."""
        self._change(lambda branches: branches.switch(branch_id))
        _keep_to(self._session, branch_id)

    def delete_branch(self, branch_id: str, force: bool = False) -> None:
        """See BranchingSession.delete_branch()."""
        self._change(lambda branches: branches.delete(branch_id, force=force))
        if self._session.key.branch == branch_id:
            _keep_to(self._session, MAIN_BRANCH)

    def list_branches(self) -> list[dict[str, Any]]:
        """See BranchingSession.list_branches()."""
        return self._ask(Branches.listing)

    def get_conversation_turns(
        self,
        branch_id: str | None = None,
        *,
        after: int = 0,
        limit: int | None = None,
    ) -> list[dict[str, Any]]:
        """See BranchingSession.get_conversation_turns()."""
        check_limit(limit)
        return self._ask(
            lambda branches: turns.conversation_turns(
                branches, branch_id, after=after, limit=limit
            )
        )

    def find_turns_by_content(
        self,
        search_term: str,
        branch_id: str | None = None,
        *,
        after: int = 0,
        limit: int | None = None,
    ) -> list[dict[str, Any]]:
        """See BranchingSession.find_turns_by_content()."""
        check_limit(limit)
        return self._ask(
            lambda branches: turns.find_turns(
                branches, search_term, branch_id, after=after, limit=limit
            )
        )

    def get_conversation_by_turns(
        self, branch_id: str | None = None
    ) -> dict[int, list[dict[str, str | None]]]:
        """See BranchingSession.get_conversation_by_turns()."""
        return self._ask(
            lambda branches: turns.conversation_by_turns(branches, branch_id)
        )

    def get_tool_usage(
        self, branch_id: str | None = None
    ) -> list[tuple[str | None, int, int]]:
        """See BranchingSession.get_tool_usage()."""
        return self._ask(lambda branches: turns.tool_usage(branches, branch_id))

    @property
    def _backend(self) -> DatabaseBackend:
        return cast("DatabaseBackend", self._session.backend)

    def _ask(self, question: Callable[[Branches], T]) -> T:
        return self._backend.ask(self._session.key, question)

    def _change(self, change: Callable[[Branches], T]) -> T:
        return self._backend.change(self._session.key, change)

    def _fork(self, change: Callable[[Branches], str]) -> str:
        name = self._change(change)
        _keep_to(self._session, name)
        return name


def _on_branch(session: BackendSession, branch_id: str) -> BackendSession:
    check_branch(branch_id)
    key = replace(session.key, branch=branch_id)
    return BackendSession.from_key(
        session.backend, key, session_settings=session.session_settings
    )


def _keep_to(session: BackendSession, branch_id: str) -> None:
    # Only a session that was opened on a branch of its own remembers one.
    if session.key.branch is not None:
        session.key = replace(session.key, branch=branch_id)
