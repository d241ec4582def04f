"""Readers beside writers, damaged items, and what a client of ours sends along."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from agent_sessions.backends.dapr import DaprBackend
from agent_sessions.backends.dapr.records import (
    decode_segment,
    encode_segment,
)
from agent_sessions.exceptions import InvalidBackend, StorageError
from tests.servers.dapr import DaprSidecar
from tests.support.dapr_stores import (
    HEAD,
    KEY,
    make_backend,
    said,
    says,
    segments_of,
    write_singly,
)

pytestmark = pytest.mark.one_database


@pytest.fixture
def backend(dapr_server: DaprSidecar) -> Iterator[DaprBackend]:
    found = make_backend()
    yield found
    found.close()


def between(
    sidecar: DaprSidecar, work: Callable[[], object], *, times: int = 1
) -> None:
    """Work after a reader has the head, before it has the segments."""
    left = [work] * times

    def interfere(name: str, keys: list[str], done: bool) -> None:
        if name == "GetBulkState" and not done and left:
            left.pop()()

    sidecar.faults.interfere = interfere


def test_a_reader_that_a_clear_overtakes_begins_anew(
    backend: DaprBackend, dapr_server: DaprSidecar
) -> None:
    other = make_backend()
    write_singly(backend, 10)
    between(dapr_server, lambda: other.clear(KEY))
    assert said(backend) == []
    write_singly(backend, 10)
    between(dapr_server, lambda: other.clear(KEY))
    assert backend.page(KEY).items == []
    other.close()


def test_a_reader_sees_one_moment(
    backend: DaprBackend, dapr_server: DaprSidecar
) -> None:
    other = make_backend()
    write_singly(backend, 10)
    between(dapr_server, lambda: other.append(KEY, says(*range(10, 20))))
    assert said(backend) == [str(n) for n in range(10)]
    between(dapr_server, lambda: [other.pop(KEY) for _ in range(15)])
    assert said(backend) == [str(n) for n in range(5)]
    other.close()


def test_a_pop_that_another_overtakes_takes_the_next(
    backend: DaprBackend, dapr_server: DaprSidecar
) -> None:
    other = make_backend()
    write_singly(backend, 9)
    backend.pop(KEY)
    taken: list[Any] = []
    between(dapr_server, lambda: taken.append(other.pop(KEY)))
    assert [backend.pop(KEY), *taken] == says(6, 7)
    other.close()


def test_a_history_without_rest_is_an_error_that_ends(
    backend: DaprBackend, dapr_server: DaprSidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent_sessions.backends.dapr.reading.READS", 3)
    write_singly(backend, 10)
    lost = segments_of(dapr_server)[0]
    del dapr_server.records[lost]

    def move() -> None:
        dapr_server.records[HEAD].version += 1

    between(dapr_server, move, times=3)
    with pytest.raises(StorageError, match="again and again"):
        backend.latest(KEY, None)
    between(dapr_server, move, times=3)
    with pytest.raises(StorageError, match="again and again"):
        backend.page(KEY)
    # A segment that is gone for good is one that can't be read.
    assert said(backend) == [str(n) for n in range(4, 10)]


def test_pops_go_round_what_cant_be_read(
    backend: DaprBackend, dapr_server: DaprSidecar
) -> None:
    """Segment 1 of 3 can't be read item by item, and segment 2 in part."""
    write_singly(backend, 13)
    damaged = {1: range(4), 2: (1, 3)}
    for number, places in damaged.items():
        key = segments_of(dapr_server)[number]
        entries = list(decode_segment(dapr_server.records[key].data))
        for place in places:
            entries[place] = type(entries[place])("not json", entries[place].turn)
        dapr_server.records[key].data = encode_segment(entries)
    popped = [backend.pop(KEY) for _ in range(8)]
    assert popped == [*says(12, 10, 8, 3, 2, 1, 0), None]
    rows = backend.page(KEY).items
    assert [row.raw for row in rows] == ["not json"] * 6
    backend.append(KEY, says("new"))
    assert said(backend) == ["new"]
    assert backend.clear(KEY) == 7
    assert list(dapr_server.records) == [HEAD]


def test_an_entry_of_an_unknown_shape_stays_in_its_place(
    backend: DaprBackend, dapr_server: DaprSidecar
) -> None:
    write_singly(backend, 6)
    [key] = segments_of(dapr_server)
    dapr_server.records[key].data = b'[[0, 0, "{}"], 5, {"a": 1}, [1, 2]]'
    assert [row.item for row in backend.page(KEY).items] == [
        {},
        None,
        {"a": 1},
        None,
        *says(4, 5),
    ]


def test_the_token_of_the_sidecar_is_sent(
    dapr_server: DaprSidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAPR_API_TOKEN", "secret")
    backend = make_backend()
    backend.append(KEY, says("a"))
    assert dapr_server.counts.tokens == {"secret"}
    assert "secret" not in repr(backend)
    backend.close()


def test_the_address_can_be_given(
    dapr_server: DaprSidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAPR_GRPC_PORT", "1")
    backend = make_backend(address=dapr_server.address)
    backend.append(KEY, says("a"))
    assert said(backend) == ["a"]
    backend.close()


def test_an_address_that_cant_be_read_is_named(dapr_server: DaprSidecar) -> None:
    with pytest.raises(InvalidBackend, match="host:port"):
        make_backend(address="ftp://nowhere:1:2").latest(KEY, None)


async def test_one_client_serves_a_loop_and_is_closed_with_it(
    dapr_server: DaprSidecar,
) -> None:
    backend = make_backend()
    await backend.aappend(KEY, says("a"))
    first = await backend._sidecars.get()
    await backend.alatest(KEY, None)
    assert await backend._sidecars.get() is first
    await backend._sidecars.aclose()
    assert await backend._sidecars.get() is not first
    assert await backend.alatest(KEY, None) == says("a")
    backend.close()
