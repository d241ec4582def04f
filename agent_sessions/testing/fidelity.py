"""Items come back as they were, up to the order of keys."""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent_sessions.testing.base import (
    ContractBase,
    Item,
    T,
    assert_same,
    each,
    message,
)


def _deep() -> Item:
    item: Item = {}
    for _ in range(60):
        item = {"a": [item]}
    return item


VALUES: dict[str, Any] = {
    "unicode": "Grüße, 世界, שלום, 👩‍👩‍👧‍👦, e\u0301",
    "lone_surrogates": "high \ud83d low \ude00 end",
    "nul": "before\x00after",
    "control_characters": "".join(map(chr, range(32))) + "\x7f\x85\u2028\u2029\ufeff",
    "line_ends_and_blanks": "  \r\n\t text \n\n ",
    "quotes_and_escapes": "\"'`\\ \\u0041 \\\\ %s %(x)s {x} $1 ? :name -- ; /*",
    "exponent": 1e22,
    "small_exponent": 1e-300,
    "largest_float": 1.7976931348623157e308,
    "float_of_many_digits": 0.1 + 0.2,
    "float_without_fraction": 1.0,
    "negative_zero": -0.0,
    "big_integer": 2**64 + 1,
    "huge_integer": -(10**400),
    "above_double_precision": 2**53 + 1,
    "true": True,
    "false": False,
    "null": None,
    "one": 1,
    "empty_string": "",
    "empty_dict": {},
    "empty_list": [],
    "mixed_list": [1, 1.0, True, None, "1", [], {}],
    "deep": _deep(),
    "wide": {f"key {number}": number for number in range(500)},
    "json_in_a_string": '{"a": [1, 2.0, null], "b": "\\u0000"}',
    "html": "<script>alert('x')</script>&amp;",
}

ITEMS: dict[str, Item] = {
    "user_message": message("hi"),
    "typed_message": {"type": "message", "role": "system", "content": "be brief"},
    "content_parts": {
        "role": "user",
        "content": [
            {"type": "input_text", "text": "what is this?"},
            {"type": "input_image", "image_url": "data:image/png;base64,iVBORw0KGgo="},
        ],
    },
    "assistant_message": {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": "hi", "annotations": []}],
    },
    "function_call": {
        "type": "function_call",
        "call_id": "call_1",
        "name": "add",
        "arguments": '{"a":1,"b":1e22}',
    },
    "function_call_output": {
        "type": "function_call_output",
        "call_id": "call_1",
        "output": [{"type": "input_text", "text": "3"}],
    },
    "reasoning": {
        "id": "rs_1",
        "type": "reasoning",
        "summary": [{"type": "summary_text", "text": "hm"}],
        "encrypted_content": "gAAAAA",
    },
    "compaction": {"type": "compaction", "encrypted_content": "gAAAAA"},
    "item_reference": {"type": "item_reference", "id": "msg_1"},
    "of_no_known_type": {"type": "from the future", "payload": {"a": 1}},
    "empty": {},
    "odd_columns": {"type": 7, "role": ["user"], "content": None, "call_id": {"a": 1}},
    "long_columns": {
        "type": "t" * 5_000,
        "role": "r" * 5_000,
        "call_id": "c" * 5_000,
        "name": "n" * 5_000,
    },
    "columns_no_database_takes": {
        "type": "message\x00",
        "role": "user\ud800",
        "call_id": "\x00",
        "name": "\udfff",
        "content": "\x00\ud800",
    },
    # The SDK strips its own keys itself.
    "unknown_keys": {
        **message("hi"),
        "_agents_tool_description": "kept for the SDK",
        "_agents_tool_title": "kept too",
        "provider_data": {"model": "m", "response_id": "r"},
        "unknown_key": {"nested": [1]},
        "": "empty key",
        "key with \x00, \ud800 and 世界": 1,
        "__proto__": {},
        "id": None,
    },
    # MySQL's TEXT ends at 64 KB.
    "a_megabyte": message("Grüße " * 175_000),
}

any_text = st.text(alphabet=st.characters(), max_size=20)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | any_text,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(any_text, inner, max_size=4)
    ),
    max_leaves=12,
)
json_items = st.dictionaries(
    st.sampled_from(["type", "role", "content", "call_id", "name", "id"]) | any_text,
    json_values,
    max_size=6,
)


class FidelityCases(ContractBase):
    generated: ClassVar[st.SearchStrategy[Item]] = json_items
    """The items that hypothesis makes."""

    @each(VALUES)
    async def test_value_comes_back(self, value: Any) -> None:
        """A value is the same in a message's content and deep in unknown keys."""
        session = await self.open()
        item = {"role": "user", "content": value, "extra": {"deep": [{"er": value}]}}
        await session.add_items([item])
        assert_same(await session.get_items(), [item])
        assert_same(await session.pop_item(), item)

    @each(ITEMS)
    async def test_item_comes_back(self, item: Item) -> None:
        """Items of every type, key and size come back; the store checks no schema."""
        session = await self.open()
        await session.add_items([message("before"), item, message("after")])
        assert_same((await session.get_items())[1], item)

    def test_generated_items_come_back(self) -> None:
        """Any JSON that hypothesis thinks of comes back, in its order."""
        session = self.run_coroutine(self.open)

        async def round_trip(batch: list[Item]) -> None:
            await session.add_items(batch)
            assert_same(await session.get_items(limit=len(batch)), batch)

        self.generate(st.lists(self.generated, max_size=5), round_trip)

    def test_generated_operations_match_a_list(self) -> None:
        """Whatever the calls and their order, the session acts as a list would."""
        calls = st.one_of(
            st.tuples(st.just("add"), st.lists(self.generated, max_size=3)),
            st.tuples(st.just("pop"), st.none()),
            st.tuples(st.just("get"), st.none() | st.integers(0, 12)),
            st.tuples(st.just("clear"), st.none()),
        )

        async def replay(script: list[tuple[str, Any]]) -> None:
            session = await self.open()
            model: list[Item] = []
            for name, argument in script:
                if name == "add":
                    await session.add_items(argument)
                    model += argument
                elif name == "pop":
                    popped = model.pop() if model else None
                    assert_same(await session.pop_item(), popped)
                elif name == "clear":
                    await session.clear_session()
                    model = []
                else:
                    newest = model if argument is None else model[::-1][:argument][::-1]
                    assert_same(await session.get_items(argument), newest)
            assert_same(await session.get_items(), model)

        self.generate(st.lists(calls, max_size=12), replay)

    def generate(
        self,
        values: st.SearchStrategy[T],
        check: Callable[[T], Coroutine[Any, Any, None]],
    ) -> None:
        """Run a coroutine function with each of `examples` generated values."""

        @settings(
            max_examples=self.examples,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(values)
        def run(value: T) -> None:
            self.run_coroutine(functools.partial(check, value))

        run()
