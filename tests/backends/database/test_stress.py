"""The stress benchmark at a small scale, and that its checker finds what is wrong.

`python -m benchmarks.stress` does the same with 32 writers and 100 kills.
"""

from __future__ import annotations

from typing import Any

import pytest
from django.db.models import F

from agent_sessions import DjangoSession
from agent_sessions.models import AgentSession, Branch, SessionItem
from benchmarks.stress.history import History, batch
from benchmarks.stress.rounds import stress_kills, stress_poppers, stress_writers


def test_writers_of_several_processes_lose_double_tear_and_reorder_nothing(
    database_environment: dict[str, str],
) -> None:
    outcome = stress_writers(
        database_environment,
        "writers",
        processes=4,
        writers=8,
        batches=20,
        seconds=120,
    )
    assert outcome.problems == []
    assert outcome.lines[0].startswith("8 writers in 4 processes: 160 batches")


def test_poppers_of_several_processes_never_get_the_same_item(
    database_environment: dict[str, str],
) -> None:
    outcome = stress_poppers(
        database_environment, "poppers", poppers=4, batches=40, seconds=120
    )
    assert outcome.problems == []


def test_what_was_acknowledged_outlives_kill_9(
    database_environment: dict[str, str],
) -> None:
    outcome = stress_kills(database_environment, "kills", kills=5)
    assert outcome.problems == []


@pytest.mark.django_db
class TestHistory:
    """What would be a violation is found."""

    def checked(self) -> list[str]:
        history = History("h")
        history.read_on()
        history.compare_batches([1, 2], 3)
        return history.problems

    @pytest.fixture(autouse=True)
    def stored(self, db: None) -> None:
        for number in range(3):
            for writer in (1, 2):
                DjangoSession("h").sync.add_items(batch(writer, number))

    @property
    def items(self) -> Any:
        return SessionItem.objects.order_by("position")

    def test_a_whole_history_is_right(self) -> None:
        assert self.checked() == []

    def test_a_lost_item(self) -> None:
        self.items.filter(position=2).delete()
        assert "comes after position 1" in self.checked()[0]

    def test_a_lost_batch_at_the_end(self) -> None:
        self.items.filter(position__gt=12).delete()
        assert "writer 2 has 2 of 3 batches" in self.checked()

    def test_a_torn_batch_at_the_end(self) -> None:
        self.items.filter(position=14).delete()
        assert any("torn" in text for text in self.checked())

    def test_two_items_in_the_wrong_order(self) -> None:
        first, second = self.items[0], self.items[1]
        self.items.filter(pk=first.pk).update(data=second.data)
        self.items.filter(pk=second.pk).update(data=first.data)
        assert any("should be" in text for text in self.checked())

    def test_a_batch_within_another(self) -> None:
        middle = self.items.filter(position__in=(2, 3))
        one, other = middle
        self.items.filter(pk=one.pk).update(data=other.data)
        self.items.filter(pk=other.pk).update(data=one.data)
        assert any("should be" in text for text in self.checked())

    def test_a_doubled_batch(self) -> None:
        DjangoSession("h").sync.add_items(batch(2, 2))
        assert any("(2, 3, 0) should be" in text for text in self.checked())

    def test_other_contents(self) -> None:
        self.items.filter(position=3).update(
            data='{"role": "user", "content": "2 0 0 other"}'
        )
        assert any("other contents" in text for text in self.checked())

    def test_a_wrong_turn(self) -> None:
        self.items.filter(position=3).update(turn=9)
        assert "position 3, item (2, 0, 0): has turn 9, not 2" in self.checked()

    def test_counters_that_drifted(self) -> None:
        AgentSession.objects.update(item_count=F("item_count") + 1)
        Branch.objects.update(head=F("head") + 2, turn=F("turn") + 3)
        assert self.checked() == [
            "(item_count, head, turn) is (15, 16, 9), not (14, 14, 6)"
        ]
