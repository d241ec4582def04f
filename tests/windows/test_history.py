"""Windows on a history: what each keeps."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from agent_sessions.items import encode_batch
from agent_sessions.items.kinds import opens_turn, type_and_role
from agent_sessions.windows import (
    Window,
    chain,
    drop_old_tool_outputs,
    keep_system_prefix,
    last_turns,
    token_budget,
    whole_turns,
)
from tests.support.histories import (
    Item,
    calls,
    gives,
    says,
    system,
    thinks,
    user,
)

NEW = [user("new")]


def one(item: Item) -> int:
    return 1


def talk(turns: int) -> list[Item]:
    """Return turns of a question and an answer."""
    return [item for n in range(turns) for item in (user(f"q{n}"), says(f"a{n}"))]


# --- turns ---------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_last_turns_keeps_the_newest(count: int) -> None:
    history = talk(3)
    expected = history[-2 * count :] if count < 3 else history
    assert last_turns(count)(history, NEW) == [*expected, *NEW]


def test_a_turn_has_all_until_the_next_user_message() -> None:
    turn = [user("q"), thinks("1"), calls("c"), gives("c"), thinks("2"), says("a")]
    assert last_turns(1)([*talk(2), *turn], NEW) == [*turn, *NEW]


def test_what_stands_before_the_first_turn_is_one_too() -> None:
    history = [says("Welcome"), *talk(2)]
    assert last_turns(3)(history, NEW) == [*history, *NEW]
    assert last_turns(2)(history, NEW) == [*talk(2), *NEW]


def test_a_history_without_a_user_message_stays() -> None:
    history = [says("Welcome"), says("Hello?")]
    assert last_turns(1)(history, NEW) == [*history, *NEW]


@pytest.mark.parametrize("role", ["user", "assistant", "", None, 7, ["user"], {}])
@pytest.mark.parametrize("kind", ["message", "reasoning", "", None, 7, ["x"], {}, "-"])
def test_turns_begin_where_the_store_begins_them(kind: Any, role: Any) -> None:
    for item in ({"type": kind, "role": role}, {"role": role}, {"type": kind}):
        row = encode_batch([item]).rows[0]
        assert type_and_role(item)[0] == row.type
        assert opens_turn(item) is bool(row.turn)


@pytest.mark.parametrize("window", [last_turns(1), token_budget(9), whole_turns()])
def test_nothing_stays_nothing(window: Window) -> None:
    assert window([], []) == []
    assert window([], NEW) == NEW


def test_new_input_is_all_there_whatever_it_is() -> None:
    new = [gives("nobody"), system("be brief"), user("a"), says("b"), user("c")]
    assert last_turns(1)(talk(2), new) == [*talk(2)[-2:], *new]
    assert token_budget(1, at_least=0)(talk(2), new) == new


@pytest.mark.parametrize("count", [0, -1, True, 2.0, "2"])
def test_numbers_that_cant_be_meant_are_refused(count: Any) -> None:
    with pytest.raises(ValueError, match=r"count is .*; give a whole number from 1 up"):
        last_turns(count)
    with pytest.raises(ValueError, match="max_tokens"):
        token_budget(count)
    with pytest.raises(ValueError, match="at_least"):
        token_budget(9, at_least=-1)
    with pytest.raises(ValueError, match="keep_turns"):
        drop_old_tool_outputs(-1)
    with pytest.raises(ValueError, match="keep_characters"):
        drop_old_tool_outputs(keep_characters=-1)


def test_windows_say_what_they_do() -> None:
    assert repr(last_turns(3)) == "last_turns(3)"
    window = keep_system_prefix(last_turns(3), whole_turns())
    assert repr(window) == "keep_system_prefix(chain(last_turns(3), whole_turns()))"


# --- tokens --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "kept"), [(1, 2), (3, 2), (4, 2), (5, 4), (6, 4), (7, 6), (99, 6)]
)
def test_a_budget_counts_whole_turns_and_the_new_input(budget: int, kept: int) -> None:
    history = talk(3)
    window = token_budget(budget, counter=one)
    assert window(history, NEW) == [*history[-kept:], *NEW]


@pytest.mark.parametrize(("at_least", "kept"), [(0, 0), (1, 2), (2, 4), (9, 6)])
def test_at_least_so_many_turns_stay(at_least: int, kept: int) -> None:
    history = talk(3)
    window = token_budget(1, counter=one, at_least=at_least)
    assert window(history, NEW) == [*history[6 - kept :], *NEW]


def test_a_large_turn_ends_the_window() -> None:
    """No hole: an older turn that would fit is not sent without those after it."""
    history = [*talk(1), user("x"), *[says(str(n)) for n in range(50)], *talk(1)]
    assert token_budget(9, counter=one)(history, NEW) == [*talk(1), *NEW]


def test_a_late_output_is_counted_with_its_call() -> None:
    history = [user("old"), calls("c"), *talk(1), user("q"), gives("c"), says("done")]
    kept = [calls("c"), user("q"), gives("c"), says("done"), *NEW]
    assert token_budget(6, counter=one)(history, NEW) == kept
    assert token_budget(4, counter=one, at_least=0)(history, NEW) == NEW


def test_what_the_new_input_binds_is_counted() -> None:
    history = [user("old"), calls("c"), *talk(1)]
    for budget, kept in ((3, [calls("c")]), (4, [calls("c"), *talk(1)])):
        window = token_budget(budget, counter=one, at_least=0)
        assert window(history, [gives("c")]) == [*kept, gives("c")]


def test_no_more_is_counted_than_is_needed() -> None:
    """Counting is dear: what is older than the window isn't looked at."""
    seen: list[Item] = []

    def counter(item: Item) -> int:
        seen.append(item)
        return 1

    history = talk(500)
    token_budget(5, counter=counter)(history, NEW)
    assert len(seen) == 1 + 2 + 2 + 2


# --- prefix --------------------------------------------------------------------


def test_the_prefix_stays_whatever_is_cut() -> None:
    prefix = [system("Alice is 12"), system("Be kind", "developer")]
    history = [*prefix, *talk(3), system("later")]
    for inner in (last_turns(1), token_budget(1, counter=one), whole_turns()):
        kept = keep_system_prefix(inner)(history, NEW)
        assert kept[:2] == prefix
        assert kept[2:] == inner(history[2:], NEW)


def test_without_it_the_prefix_goes() -> None:
    assert last_turns(1)([system("x"), *talk(2)], NEW) == [*talk(2)[2:], *NEW]


def test_a_role_may_be_anything() -> None:
    odd = {"type": "message", "role": ["system"], "content": "x"}
    history = [odd, *talk(2)]
    assert keep_system_prefix(last_turns(1))(history, NEW) == [*history[-2:], *NEW]


def test_a_budget_counts_the_prefix() -> None:
    history = [system("a"), system("b"), *talk(2)]
    for budget, kept in ((5, 2), (6, 2), (7, 4)):
        window = keep_system_prefix(token_budget(budget, counter=one))
        assert window(history, NEW) == [*history[:2], *history[-kept:], *NEW]


def test_the_prefix_takes_windows_only() -> None:
    def mine(history: list[Any], new: list[Any]) -> list[Any]:
        return history + new

    with pytest.raises(TypeError, match=r"chain\(mine, keep_system_prefix"):
        keep_system_prefix(mine)  # type: ignore[arg-type]


# --- several -------------------------------------------------------------------


def test_chained_windows_cut_one_after_another() -> None:
    window = chain(last_turns(3), token_budget(5, counter=one))
    assert isinstance(window, Window)
    assert window(talk(5), NEW) == [*talk(5)[-4:], *NEW]
    assert chain()(talk(2), NEW) == [*talk(2), *NEW]


async def test_callbacks_of_ones_own_join_in() -> None:
    """Plain and async; what one adds is new input to those after it."""
    fact = system("It is Monday")
    added = user("extra")

    def plain(history: list[Any], new: list[Any]) -> list[Any]:
        return [fact, *history, *new]

    async def later(history: list[Any], new: list[Any]) -> list[Any]:
        assert fact in new
        return [*history, *new, added]

    callback = chain(plain, last_turns(1), later)
    history = talk(3)
    assert await callback(history, NEW) == [*history[-2:], fact, *NEW, added]
    # A window leaves everything where it was.
    callback = chain(plain, last_turns(1))
    assert await callback(history, NEW) == [fact, *history[-2:], *NEW]


async def test_a_callback_must_return_a_list() -> None:
    callback = chain(lambda history, new: None, last_turns(1))
    with pytest.raises(TypeError, match="returned NoneType; it must return the list"):
        await callback(talk(1), NEW)


def test_equal_items_are_told_apart() -> None:
    """A user says the same twice."""
    history = [user("again"), user("again")]
    new = [user("again")]
    kept = last_turns(1)(history, new)
    assert [id(item) for item in kept] == [id(history[1]), id(new[0])]


def test_importing_it_imports_neither_the_sdk_nor_tiktoken() -> None:
    code = (
        "import sys, agent_sessions.windows as h; h.token_budget(9)([], []); "
        "print({'agents', 'openai', 'tiktoken'} & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
