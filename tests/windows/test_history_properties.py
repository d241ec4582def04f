"""What holds for every window on every history, however broken it is."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
from agents.run_internal.items import drop_orphan_function_calls
from hypothesis import given, settings
from hypothesis import strategies as st

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
    approval,
    calls,
    gives,
    says,
    system,
    thinks,
    user,
)


def length(item: Item) -> int:
    return len(str(item.get("output", "")))


WINDOWS: dict[str, Window] = {
    "one turn": last_turns(1),
    "two turns": last_turns(2),
    "strict budget": token_budget(9, counter=lambda item: 1, at_least=0),
    "budget": token_budget(12, counter=length, at_least=2),
    "whole": whole_turns(),
    "outputs": drop_old_tool_outputs(1, keep_characters=2, marker="…"),
    "prefix": keep_system_prefix(last_turns(1)),
    "prefix and budget": keep_system_prefix(
        drop_old_tool_outputs(marker=""), token_budget(5, counter=lambda item: 1)
    ),
    "chain": chain(whole_turns(), drop_old_tool_outputs(0), last_turns(3)),
}
each_window = pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)

# Call types and their outputs, written out apart from the code under test.
OUTPUTS = {
    "function_call_output": "function_call",
    "custom_tool_call_output": "custom_tool_call",
    "shell_call_output": "shell_call",
    "local_shell_call_output": "local_shell_call",
    "apply_patch_call_output": "apply_patch_call",
    "computer_call_output": "computer_call",
    "tool_search_output": "tool_search_call",
    "program_output": "program",
}
# Hosted tools give theirs within the response.
HOSTED = {
    "shell_call_output",
    "apply_patch_call_output",
    "tool_search_output",
    "program_output",
}
KINDS = ["user", "user", "says", "thinks", "system", "developer", "mcp", "compaction"]
KINDS += [*OUTPUTS, *OUTPUTS.values()]
# Few ids, so that they come twice, in the wrong order and with no partner.
ids = st.sampled_from(["a", "b", "c", None])
texts = st.sampled_from(["", "x", "a long output of a tool"])


@st.composite
def any_item(draw: st.DrawFn) -> Item:
    kind = draw(st.sampled_from(KINDS))
    if kind in {"user", "says", "thinks"}:
        make = {"user": user, "says": says, "thinks": thinks}[kind]
        return make(draw(texts))
    if kind in {"system", "developer"}:
        return system("rule", kind)
    if kind == "mcp":
        return copy.deepcopy(draw(st.sampled_from(approval(draw(ids) or "a"))))
    item: Item = {"type": kind, "call_id": draw(ids)}
    return item | {"output": draw(texts)} if kind in OUTPUTS else item


@st.composite
def sound_history(draw: st.DrawFn) -> list[Item]:
    """Draw what runs really store: whole responses, parallel calls, late outputs."""
    history: list[Item] = draw(st.sampled_from([[], [system("rule")], [says("Hi")]]))
    late: list[Item] = []
    for turn in range(draw(st.integers(0, 6))):
        history = [*history, user(f"q{turn}"), *late]
        late = []
        for step in range(draw(st.integers(0, 2))):
            names = [f"{turn}.{step}.{n}" for n in range(draw(st.integers(1, 3)))]
            if draw(st.booleans()):
                history.append(thinks(f"{turn}.{step}"))
            history += [calls(name) for name in names]
            outputs = [gives(name, draw(texts)) for name in names]
            ready = draw(st.integers(0, len(names)))
            history += outputs[:ready]
            late += outputs[ready:]
        history += [thinks(f"{turn}"), says(f"a{turn}")]
    return [*history, *late]


histories = st.lists(any_item(), max_size=25) | sound_history()
inputs = st.lists(any_item(), max_size=3) | st.just([user("new")])


def partner(items: list[Item], index: int) -> int | None:
    """Find the call of an output, by looking at every item."""
    output = items[index]
    kind = output["type"]
    call_id = output.get("call_id")
    if call_id is None and kind == "local_shell_call_output":
        call_id = output.get("id")
    fits = [
        i
        for i, item in enumerate(items)
        if item.get("type") == OUTPUTS[kind] and item["call_id"] == call_id
    ]
    before = [i for i in fits if i < index]
    return before[-1] if before else fits[0] if fits else None


def from_model(item: Item) -> bool:
    kind: str = item.get("type", "message")
    if kind == "message":
        return bool(item["role"] == "assistant")
    return not kind.endswith("response") and (kind in HOSTED or kind not in OUTPUTS)


def is_orphan(items: list[Item], index: int) -> bool:
    """Return whether an output names a call that isn't there."""
    if items[index].get("type") not in OUTPUTS or partner(items, index) is not None:
        return False
    return isinstance(items[index].get("call_id"), str)


def newest_compaction(history: list[Item]) -> int | None:
    found = [i for i, item in enumerate(history) if item.get("type") == "compaction"]
    return found[-1] if found else None


@each_window
@settings(deadline=None)
@given(history=histories, new=inputs)
def test_what_is_returned(window: Window, history: list[Item], new: list[Item]) -> None:
    items = [*history, *new]
    # Told by identity, so that what the window shortens stays the same item.
    places = {id(item): index for index, item in enumerate(items)}
    assert len(places) == len(items)
    kept = [places[id(item)] for item in window([*history], [*new])]
    # A part of the history in its order, then the whole new input.
    assert kept == sorted(set(kept))
    assert kept[len(kept) - len(new) :] == [*range(len(history), len(items))]
    there = set(kept)
    calls_of = {
        index: partner(items, index)
        for index, item in enumerate(items)
        if item.get("type") in OUTPUTS
    }
    for output, call in calls_of.items():
        if is_orphan(items, output):
            assert output not in there or output >= len(history), "an orphan"
        elif call is not None:
            assert (call in there) == (output in there), "a call and its output"
    newest = newest_compaction(history)
    for one, other in pairwise(range(len(history))):
        if newest in there and newest in {one, other}:
            # Sent by itself too.
            continue
        orphaned = is_orphan(items, one) or is_orphan(items, other)
        if from_model(items[one]) and from_model(items[other]) and not orphaned:
            assert (one in there) == (other in there), "a response was cut"


@each_window
@settings(deadline=None)
@given(history=histories, new=inputs)
def test_twice_is_once(window: Window, history: list[Item], new: list[Item]) -> None:
    once = window(copy.deepcopy(history), copy.deepcopy(new))
    past = copy.deepcopy(once[: len(once) - len(new)])
    assert window(past, copy.deepcopy(new)) == once


@each_window
@settings(deadline=None)
@given(history=sound_history())
def test_the_sdk_finds_nothing_to_drop(window: Window, history: list[Any]) -> None:
    """Its own pass over orphans removes calls, outputs and reasoning left behind."""
    sound = drop_orphan_function_calls(history)
    assert len(sound) == len(history)
    sent: list[Any] = window(history, [user("new")])
    everywhere = set(range(len(sent)))
    left = drop_orphan_function_calls(sent, output_pruning_indexes=everywhere)
    assert left == sent


@settings(deadline=None)
@given(history=histories, new=inputs, count=st.integers(1, 4))
def test_the_newest_compaction_stays(
    history: list[Item], new: list[Item], count: int
) -> None:
    newest = newest_compaction(history)
    for window in (last_turns(count), whole_turns(), token_budget(1, at_least=count)):
        kept = [id(item) for item in window(history, new)]
        assert newest is None or id(history[newest]) in kept


@settings(deadline=None)
@given(history=histories, new=inputs, count=st.integers(1, 4))
def test_no_more_turns_than_asked(
    history: list[Item], new: list[Item], count: int
) -> None:
    turns = [item for item in history if item.get("role") == "user"]
    kept = last_turns(count)(history, new)
    past = [item for item in kept[: len(kept) - len(new)] if item.get("role") == "user"]
    assert [id(item) for item in past] == [id(item) for item in turns[-count:]]


@settings(deadline=None)
@given(history=histories, new=inputs, budget=st.integers(1, 30))
def test_a_strict_budget_holds(
    history: list[Item], new: list[Item], budget: int
) -> None:
    """Only the new input and what it can't be parted from may go beyond."""
    window = token_budget(budget, counter=lambda item: 1, at_least=0)
    least = len(token_budget(1, counter=lambda item: 1, at_least=0)(history, new))
    kept = len(window(history, new))
    assert kept <= max(budget, least)
    larger = token_budget(budget + 5, counter=lambda item: 1, at_least=0)
    assert len(larger(history, new)) >= kept
