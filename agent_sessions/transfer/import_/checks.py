"""See that a source's session can be kept before anything of it is written."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from django.db import models

from agent_sessions.backends.arguments import check_session_id
from agent_sessions.exceptions import InvalidSessionId
from agent_sessions.models import MAIN_BRANCH, AgentRun, AgentSession
from agent_sessions.transfer.import_.records import (
    ImportProblem,
    SourceBranch,
    SourceRun,
    SourceSession,
)

NAME_LENGTH = 255
# Where repairs put what doesn't fit; no conversation goes on there.
RESERVED = frozenset({"quarantine"})
MOST_TURNS = 2**31 - 1
MOST_POSITIONS = 2**63 - 1
# Each is compared with those before it, and a session's row names all of them.
MOST_BRANCHES = 2_000
# Each is held in memory, with its usage.
MOST_RUNS = 100_000
# Lists and objects within each other: writing JSON needs a call for each.
MOST_DEPTH = 100


def check_session(session: SourceSession) -> None:
    """Refuse what can't be stored. Raises ImportProblem."""
    if session.problem:
        raise ImportProblem(session.problem)
    try:
        check_session_id(session.session_id)
    except InvalidSessionId as exc:
        raise ImportProblem(str(exc)) from exc
    if session.owner is not None and not isinstance(session.owner, str):
        raise ImportProblem("its owner is no username. Mend the source.")
    if len(session.branches) > MOST_BRANCHES:
        raise ImportProblem(
            f"it has more than {MOST_BRANCHES:,} branches. Delete some in the source."
        )
    known: set[str] = set()
    for branch in session.branches:
        _check_branch(branch, known)
        known.add(branch.name)
    shown = {each.name for each in session.branches if not each.archived}
    if session.shown not in shown:
        raise ImportProblem(
            "it names no current branch that is shown, and has none called "
            f"{MAIN_BRANCH!r}. Name one of its branches in the source."
        )
    if not _is_storable(session.columns.get("metadata")):
        raise ImportProblem("its metadata can't be kept here. Mend it in the source.")
    _check_runs(session)


def _check_branch(branch: SourceBranch, known: set[str]) -> None:
    name = branch.name
    if (branch.parent is not None and branch.parent not in known) or name in known:
        raise ImportProblem(f"its branch {name!r} comes twice, or before its parent.")
    # Undone and repaired branches have a ~; one that is shown would pass for those.
    if (
        not 1 <= len(name) <= NAME_LENGTH
        or not _is_storable(name)
        or name in RESERVED
        or ("~" in name and not branch.archived)
    ):
        raise ImportProblem(
            f"its branch {name[:NAME_LENGTH]!r} has a name that can't be kept here."
        )
    fork = branch.fork_position
    numbers = (
        (fork or 0, MOST_POSITIONS),
        (branch.head or 0, MOST_POSITIONS),
        (branch.turn or 0, MOST_TURNS),
    )
    if (branch.parent is None) != (fork is None) or not all(
        0 <= number <= most for number, most in numbers
    ):
        raise ImportProblem(
            f"its branch {name!r} has a fork, head or turn that can't be. Mend it in "
            "the source."
        )


def _check_runs(session: SourceSession) -> None:
    """See that rows can be made of the runs, and that their sums fit."""
    if len(session.runs) > MOST_RUNS:
        raise ImportProblem(
            f"it has more than {MOST_RUNS:,} runs. Delete some in the source."
        )
    known: set[str] = set()
    for number, run in enumerate(session.runs, 1):
        if run.run_id in known:
            raise ImportProblem(
                f"its run {number} has the id of another one. Mend it in the source."
            )
        known.add(run.run_id)
        columns = {"run_id": run.run_id, **run.columns}
        for name, value in columns.items():
            if not _fits(AgentRun._meta.get_field(name), value):
                raise ImportProblem(
                    f"its run {number} has a value of {name} that can't be kept "
                    "here. Mend it in the source."
                )
    for name in session.columns:
        field = AgentSession._meta.get_field(name)
        if isinstance(field, models.IntegerField) and not _fits(
            field, session.columns[name] + _sum(session.runs, name)
        ):
            raise ImportProblem(
                f"its {name} can't be kept here: the number is too large. Mend it in "
                "the source."
            )


def _sum(runs: list[SourceRun], name: str) -> int:
    return sum(run.columns.get(name) or 0 for run in runs)


def _fits(field: Any, value: Any) -> bool:
    if value is None:
        return bool(field.null)
    if isinstance(field, models.CharField):
        return (
            isinstance(value, str)
            and len(value) <= (field.max_length or len(value))
            and _is_storable(value)
        )
    if isinstance(field, models.IntegerField):
        is_big = isinstance(
            field, models.BigIntegerField | models.PositiveBigIntegerField
        )
        most = MOST_POSITIONS if is_big else MOST_TURNS
        return isinstance(value, int) and 0 <= value <= most
    return not isinstance(field, models.JSONField) or _is_storable(value)


def _is_storable(value: Any) -> bool:
    """Return whether every database takes a text, or JSON of such texts."""
    return _depth(value) <= MOST_DEPTH and all(
        math.isfinite(each)
        if isinstance(each, float)
        else not isinstance(each, str)
        or ("\x00" not in each and not any("\ud800" <= c <= "\udfff" for c in each))
        for each in _leaves(value)
    )


def _leaves(value: Any) -> Iterator[Any]:
    """Return the keys and values within JSON, however deep it is."""
    left = [value]
    while left:
        each = left.pop()
        if isinstance(each, dict):
            left += [*each, *each.values()]
        elif isinstance(each, list):
            left += each
        else:
            yield each


def _depth(value: Any) -> int:
    """Count the lists and objects within each other, up to one more than may be."""
    depth, level = 0, [value]
    while (
        level := [each for each in level if isinstance(each, dict | list)]
    ) and depth <= MOST_DEPTH:
        depth += 1
        level = [
            inner
            for each in level
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
    return depth
