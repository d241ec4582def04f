"""What windows never part: calls and outputs, responses, and how compactions age."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from agents.run_internal.items import drop_orphan_function_calls
from openai.types.responses import ResponseOutputItem

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
    PAIRS,
    Item,
    calls,
    gives,
    pair,
    says,
    system,
    thinks,
    user,
)

NEW = [user("new")]


def one(item: Item) -> int:
    return 1


def compacted(name: str = "1") -> Item:
    return {"type": "compaction", "id": f"cmp_{name}", "encrypted_content": name}


def talk(turns: int) -> list[Item]:
    """Return turns of a question and an answer."""
    return [item for n in range(turns) for item in (user(f"q{n}"), says(f"a{n}"))]


# --- what belongs together -----------------------------------------------------


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("window", [last_turns(1), token_budget(5, counter=one)])
def test_a_late_output_keeps_its_call(kind: str, window: Window) -> None:
    """The user wrote on while an approval was pending, then approved."""
    call, output = PAIRS[kind]
    old, newest = [user("old"), thinks("1"), call], [user("q"), output, says("done")]
    kept = window([*talk(2), *old, *newest], NEW)
    assert kept == [thinks("1"), call, *newest, *NEW]


@pytest.mark.parametrize("kind", PAIRS)
def test_a_call_of_an_old_turn_goes_with_its_output(kind: str) -> None:
    call, output = PAIRS[kind]
    history = [user("old"), call, output, says("done"), *talk(1)]
    assert last_turns(1)(history, NEW) == [*talk(1), *NEW]


@pytest.mark.parametrize("kind", PAIRS)
def test_an_output_in_the_new_input_keeps_its_call(kind: str) -> None:
    """An app may run the tool itself and give the output as input."""
    call, output = PAIRS[kind]
    history = [user("old"), thinks("1"), call, *talk(2)]
    kept = [thinks("1"), call, output]
    assert token_budget(1, counter=one, at_least=0)(history, [output]) == kept
    head = [thinks("1"), call]
    assert whole_turns()(head, [output]) == kept


def test_parallel_calls_stay_whole() -> None:
    """One output of three is late; no call of that response may go."""
    response = [thinks("1"), says("Looking"), calls("a"), calls("b"), calls("c")]
    history = [user("old"), *response, gives("a"), gives("b"), *talk(1), gives("c")]
    kept = last_turns(1)(history, NEW)
    assert kept == [*response, gives("a"), gives("b"), *talk(1), gives("c"), *NEW]


# What the app gives back, in a request of its own.
FROM_THE_APP = {
    "function_call_output",
    "custom_tool_call_output",
    "computer_call_output",
    "local_shell_call_output",
    "mcp_approval_response",
}


@pytest.mark.parametrize(
    "kind",
    [
        kind
        for model in get_args(get_args(ResponseOutputItem)[0])
        for kind in get_args(model.model_fields["type"].annotation)
        if kind not in FROM_THE_APP
    ],
)
def test_whatever_a_response_holds_does_not_part_it(kind: str) -> None:
    """A hosted tool's output stands between reasoning and the call that follows it."""
    call = {"type": kind.removesuffix("_output"), "call_id": "h"}
    if kind == "tool_search_output":
        call["type"] = "tool_search_call"
    held = {"type": kind, "call_id": "h"}
    if kind == "message":
        held["role"] = "assistant"
    response = [thinks("1"), *([call] if kind != call["type"] else []), held]
    newest = [*talk(1), gives("b"), says("done")]
    history = [user("old"), *response, calls("b"), *newest]
    assert last_turns(1)(history, NEW) == [*response, calls("b"), *newest, *NEW]


def test_a_local_shell_goes_with_its_turn() -> None:
    """Its output parts two responses, which may be joined, but only within a turn."""
    call, output = pair("shell_call", "s")
    turn = [user("old"), thinks("1"), call, output, thinks("2"), says("a")]
    assert last_turns(1)([*turn, *talk(1)], NEW) == [*talk(1), *NEW]
    assert last_turns(2)([*turn, *talk(1)], NEW) == [*turn, *talk(1), *NEW]


@pytest.mark.parametrize("after", [says("a"), calls("c")])
def test_reasoning_stays_with_the_item_that_must_follow(after: Item) -> None:
    """#1709, #1882, #3268: reasoning without its following item is refused."""
    late = gives("c") if after["type"] == "function_call" else user("x")
    history = [user("old"), thinks("1"), thinks("2"), after, *talk(1), late]
    for window in (last_turns(1), last_turns(2), token_budget(3, counter=one)):
        kept = window(history, NEW)
        assert (thinks("2") in kept) is (after in kept)
        assert (thinks("1") in kept) is (after in kept)


def test_ids_that_are_counted_anew_in_every_response_tie_no_turns() -> None:
    history = [
        item
        for n in range(5)
        for item in (user(f"q{n}"), calls("call_0"), gives("call_0"), says(f"a{n}"))
    ]
    assert last_turns(1)(history, NEW) == [*history[-4:], *NEW]


def test_an_output_stored_before_its_call_keeps_it() -> None:
    history = [gives("c"), *talk(1), calls("c")]
    assert last_turns(1)(history, NEW) == [*history, *NEW]


@pytest.mark.parametrize(
    "window",
    [
        last_turns(9),
        token_budget(999),
        drop_old_tool_outputs(9),
        keep_system_prefix(last_turns(9)),
        chain(last_turns(9), token_budget(999)),
        keep_system_prefix(),
        chain(),
    ],
    ids=repr,
)
@pytest.mark.parametrize(
    "kind",
    PAIRS.keys() - {"program_and_its_call", "approved_call", "anonymous_tool_search"},
)
def test_an_output_without_its_call_is_never_sent(window: Window, kind: str) -> None:
    """#4322, #4827: every request with one is refused, for ever."""
    _, output = PAIRS[kind]
    assert window([output, *talk(2)], NEW) == [*talk(2), *NEW]


@pytest.mark.parametrize(
    "window", [last_turns(9), drop_old_tool_outputs(0), chain()], ids=repr
)
@pytest.mark.parametrize("reference", [None, {"type": "item_reference", "id": "i"}])
@pytest.mark.parametrize("call_id", [None, "c"])
@pytest.mark.parametrize(
    "kind",
    sorted({o["type"] for _, o in PAIRS.values() if o["type"].endswith("_output")}),
)
def test_an_orphan_is_what_the_sdk_takes_for_one(
    window: Window, reference: Item | None, call_id: str | None, kind: str
) -> None:
    """A hosted tool search names no call, and a reference is none."""
    output: Item = {"type": kind, "call_id": call_id}
    history: list[Any] = [*([reference] if reference else []), output, *talk(1)]
    everywhere = set(range(len(history)))
    left = drop_orphan_function_calls(history, output_pruning_indexes=everywhere)
    assert window(history, NEW) == [*left, *NEW]
    assert (output in left) is (call_id is None)


def test_items_of_kinds_to_come_are_left_alone() -> None:
    odd: list[Item] = [{"type": "wonder_output"}, {"type": 7}, {}]
    assert last_turns(9)([*odd, *talk(1)], NEW) == [*odd, *talk(1), *NEW]
    assert last_turns(1)([*odd, *talk(2)], NEW) == [*talk(2)[2:], *NEW]


def test_whole_turns_begin_with_a_user_message() -> None:
    """#4322: a session's limit cuts between call and output, or after reasoning."""
    cut = [calls("a"), gives("a"), gives("b"), says("done")]
    assert whole_turns()([*cut, *talk(1)], NEW) == [*talk(1), *NEW]
    assert whole_turns()(cut, NEW) == NEW


# --- compaction ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "kept"),
    [
        (last_turns(1), 2),
        (token_budget(1, counter=one), 2),
        (token_budget(6, counter=one, at_least=0), 4),
        (keep_system_prefix(last_turns(1)), 2),
        (whole_turns(), 18),
        (chain(whole_turns(), last_turns(20)), 18),
    ],
    ids=repr,
)
def test_the_newest_compaction_is_sent(window: Window, kept: int) -> None:
    """However old, it is all that the model remembers of what it stands for."""
    turns = talk(9)
    assert window([compacted()], NEW) == [compacted(), *NEW]
    at_head = window([compacted(), *turns], NEW)
    assert at_head == [compacted(), *turns[18 - kept :], *NEW]
    between = window([*turns[:14], compacted(), *turns[14:]], NEW)
    assert [item for item in between if item != compacted()] == at_head[1:]
    assert between.index(compacted()) == max(kept - 4, 0)


def test_older_compactions_age() -> None:
    first, second = compacted("1"), compacted("2")
    history = [first, *talk(1), second, *talk(2)]
    newest = [second, *talk(2)[2:], *NEW]
    assert last_turns(1)(history, NEW) == newest
    assert token_budget(1, counter=one)(history, NEW) == newest
    assert whole_turns()(history, NEW) == [*history[1:], *NEW]
    assert last_turns(4)(history, NEW) == [*history, *NEW]


def test_a_compaction_is_sent_without_its_response() -> None:
    """It may stand within one, or after the answer of a turn that wasn't compacted."""
    response = [thinks("1"), compacted(), calls("c")]
    history = [user("old"), *response, gives("c", "long" * 9), *talk(2)]
    assert last_turns(1)(history, NEW) == [compacted(), *talk(2)[2:], *NEW]
    kept = drop_old_tool_outputs(marker="-")(history, NEW)
    assert kept == [*history[:4], gives("c", "-"), *talk(2), *NEW]


def test_what_stays_of_a_response_keeps_its_compaction() -> None:
    response = [thinks("1"), compacted(), calls("c")]
    history = [user("old"), *response, *talk(1), gives("c")]
    assert last_turns(1)(history, NEW) == [*history[1:], *NEW]
    strict = token_budget(1, counter=one, at_least=0)
    assert strict(history[:-1], [gives("c")]) == [*response, gives("c")]


@pytest.mark.parametrize(("budget", "kept"), [(3, 0), (4, 3), (5, 3), (6, 5)])
def test_a_budget_counts_the_compaction(budget: int, kept: int) -> None:
    history = [compacted(), *talk(2)]
    expected = [compacted(), *talk(2)[5 - kept :]] if kept else []
    window = token_budget(budget, counter=one, at_least=0)
    assert window(history, NEW) == [*expected, *NEW]


@pytest.mark.parametrize(("budget", "kept"), [(2, 0), (3, 2), (4, 3)])
def test_a_budget_holds_where_nobody_asked(budget: int, kept: int) -> None:
    """Without a user's message the newest turn begins at the compaction."""
    history = [system("x"), compacted(), system("y")]
    window = token_budget(budget, counter=one, at_least=0)
    assert window(history, NEW) == [*history[3 - kept :], *NEW]
    assert token_budget(1, counter=one)(history, NEW) == [*history[1:], *NEW]
    assert last_turns(1)(history, NEW) == [*history[1:], *NEW]
    assert whole_turns()(history, NEW) == [*history[1:], *NEW]
