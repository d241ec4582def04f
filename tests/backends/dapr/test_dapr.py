"""What lies in the state store, and what becomes of it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from agent_sessions.backends.base import SessionKey
from agent_sessions.backends.dapr import DaprBackend
from agent_sessions.backends.dapr.records import head_key
from agent_sessions.exceptions import StorageError
from tests.servers.dapr import DaprSidecar
from tests.support.dapr_stores import (
    HEAD,
    KEY,
    head_of,
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


# -- segments ----------------------------------------------------------------------


def test_segments_are_sealed_and_never_written_again(
    backend: DaprBackend, dapr_server: DaprSidecar
) -> None:
    write_singly(backend, 14)
    first, *others = segments_of(dapr_server)
    head = head_of(dapr_server)
    assert (head.sealed, head.count, len(others)) == (3, 14, 2)
    assert len(head.tail) == 2
    assert head.segments == (first.split(":")[2],) * 3
    assert {dapr_server.records[key].version for key in (first, *others)} == {1}
    assert said(backend) == [str(n) for n in range(14)]
    assert said(backend, 7) == [str(n) for n in range(7, 14)]


def test_an_append_costs_the_same_at_any_length(
    backend: DaprBackend, dapr_server: DaprSidecar
) -> None:
    """Bytes and requests of the same eight appends, at 8 items and at 10,000."""

    def measure() -> tuple[int, int, int]:
        counts = type(dapr_server.counts)()
        dapr_server.counts = counts
        for _ in range(8):
            backend.append(KEY, says("x" * 200))
        return counts.received, counts.sent, sum(counts.requests.values())

    for _ in range(8):
        backend.append(KEY, says("x" * 200))
    short = measure()
    backend.append(KEY, says(*(["x" * 200] * 9980)))
    for _ in range(4):
        backend.append(KEY, says("x" * 200))
    # Both begin with one full segment in the head, so both seal two.
    assert (head_of(dapr_server).count, len(head_of(dapr_server).tail)) == (10_000, 4)
    long = measure()
    assert head_of(dapr_server).sealed == 2_501
    # Two requests an append, and one for each segment that is full.
    assert long[2] == short[2] == 2 * 8 + 2
    # The numbers in the head have more digits.
    assert abs(long[0] - short[0]) <= 8 * 60
    assert abs(long[1] - short[1]) <= 8 * 60


def test_a_large_batch_doesnt_lie_in_the_head(
    backend: DaprBackend, dapr_server: DaprSidecar
) -> None:
    backend.append(KEY, says(*range(3)))
    backend.append(KEY, says(*range(3, 103)))
    head = head_of(dapr_server)
    assert (head.sealed, len(head.tail), len(set(head.segments))) == (25, 3, 1)
    write_singly(backend, 1)
    assert said(backend) == [str(n) for n in [*range(103), 0]]


def test_large_items_fill_a_segment_by_their_size(
    backend: DaprBackend, dapr_server: DaprSidecar
) -> None:
    """Ten items of 1 MB: more than one request may hold, to write and to read."""
    texts = [f"{n}" * 1_000_000 for n in range(10)]
    backend.append(KEY, says(*texts))
    assert head_of(dapr_server).sealed == 10
    assert said(backend) == texts
    assert backend.pop(KEY) == says(texts[-1])[0]


def test_too_large_an_item_is_refused_whole(
    backend: DaprBackend, dapr_server: DaprSidecar
) -> None:
    write_singly(backend, 2)
    with pytest.raises(StorageError, match="max-body-size") as caught:
        backend.append(KEY, says("secret " * 700_000))
    assert "secret" not in str(caught.value)
    assert said(backend) == ["0", "1"]
    write_singly(backend, 1)


def test_pop_opens_the_last_segment_and_leaves_nothing_behind(
    backend: DaprBackend, dapr_server: DaprSidecar
) -> None:
    write_singly(backend, 10)
    assert [backend.pop(KEY) for _ in range(7)] == says(*range(9, 2, -1))
    assert head_of(dapr_server).sealed == 0
    assert head_of(dapr_server).garbage == ()
    assert segments_of(dapr_server) == []
    backend.append(KEY, says("a", "b"))
    assert said(backend) == ["0", "1", "2", "a", "b"]


def test_clear_leaves_nothing_that_could_come_back(
    backend: DaprBackend, dapr_server: DaprSidecar
) -> None:
    write_singly(backend, 30)
    backend.append(KEY, says("secret"))
    old = dict(dapr_server.records)
    assert backend.clear(KEY) == 31
    assert list(dapr_server.records) == [HEAD]
    assert b"secret" not in dapr_server.records[HEAD].data
    assert head_of(dapr_server).is_empty
    # A writer that is late puts its segment where nobody looks.
    for key in old.keys() - {HEAD}:
        dapr_server.records[key] = old[key]
    assert backend.latest(KEY, None) == []
    write_singly(backend, 30)
    assert said(backend) == [str(n) for n in range(30)]
    # A day later, nothing at all tells of a session that was cleared.
    backend.clear(KEY)
    dapr_server.late = 25 * 60 * 60
    assert dapr_server.get(HEAD) is None


def test_a_page_shows_positions_turns_and_times(backend: DaprBackend) -> None:
    write_singly(backend, 10)
    backend.append(KEY, [{"role": "assistant", "content": "10"}])
    page = backend.page(KEY, limit=3)
    assert [(row.position, row.turn) for row in page.items] == [
        (9, 9),
        (10, 10),
        (11, 10),
    ]
    assert (page.has_earlier, page.has_later) == (True, False)
    assert abs((datetime.now(UTC) - page.items[0].created_at).total_seconds()) < 60
    page = backend.page(KEY, before=9, limit=5)
    assert [row.position for row in page.items] == [4, 5, 6, 7, 8]
    assert (page.has_earlier, page.has_later) == (True, True)
    page = backend.page(KEY, before=4, limit=5)
    assert [row.position for row in page.items] == [1, 2, 3]
    assert (page.has_earlier, page.has_later) == (False, True)
    page = backend.page(KEY, after=6, limit=4)
    assert [row.position for row in page.items] == [7, 8, 9, 10]
    assert (page.has_earlier, page.has_later) == (True, True)
    page = backend.page(KEY, after=0, limit=50)
    assert [row.item for row in page.items[:2]] == says(0, 1)
    assert (len(page.items), page.has_earlier, page.has_later) == (11, False, False)
    assert backend.page(SessionKey("none"), limit=5).items == []
    assert backend.page(KEY, before=1, limit=5).items == []


def test_each_owner_has_keys_of_their_own() -> None:
    keys = [
        SessionKey("a"),
        SessionKey("a", 1),
        SessionKey("a", "1:user:2"),
        SessionKey("a:user:1", 2),
        SessionKey("a:user:1:owned"),
        SessionKey("a||b"),
        SessionKey("a%7C%7Cb"),
        SessionKey("a||b", 1),
        SessionKey("a%7C%7Cb", 1),
        SessionKey("a:quoted"),
        SessionKey("a:messages"),
    ]
    names = [head_key(key) for key in keys]
    # Those of backends that others wrap, too.
    names += [head_key(key, alias) for key in keys for alias in ("p", "p:in:q", "q")]
    assert len(set(names)) == 4 * len(keys)
    assert not any("||" in name for name in names)
    assert names[0] == "a:messages"


# -- corruption --------------------------------------------------------------------


@pytest.mark.parametrize("garbage", [b"", b"{", b"null", b'"x"', b"\xff\xfe"])
def test_a_corrupt_segment_is_passed_over_and_stays(
    backend: DaprBackend,
    dapr_server: DaprSidecar,
    garbage: bytes,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write_singly(backend, 14)
    name = segments_of(dapr_server)[1]
    record = dapr_server.records[name]
    whole, record.data = record.data, garbage
    expected = [str(n) for n in [*range(4), *range(8, 14)]]
    assert said(backend) == expected
    assert said(backend, 8) == expected[-8:]
    assert "can't be read" in caplog.text
    page = backend.page(KEY, limit=50)
    [lost] = [row for row in page.items if row.item is None]
    assert (lost.position, lost.raw) == (5, garbage.decode(errors="replace"))
    write_singly(backend, 6)
    assert [backend.pop(KEY) for _ in range(13)][-1] == says(3)[0]
    assert [backend.pop(KEY) for _ in range(4)] == [*says(2, 1, 0), None]
    assert record is dapr_server.records[name]
    assert record.data == garbage
    backend.append(KEY, says("new"))
    record.data = whole
    assert said(backend) == ["4", "5", "6", "7", "new"]
    backend.clear(KEY)
    assert name not in dapr_server.records


@pytest.mark.parametrize("data", [b"{", b"{}", b'{"version": 9}', b"null", b"\xff"])
def test_a_corrupt_head_is_an_error_and_stays(
    backend: DaprBackend, dapr_server: DaprSidecar, data: bytes
) -> None:
    write_singly(backend, 2)
    record = dapr_server.records[HEAD]
    whole, record.data = record.data, data
    for call in (
        lambda: backend.latest(KEY, None),
        lambda: backend.append(KEY, says("new")),
        lambda: backend.pop(KEY),
        lambda: backend.clear(KEY),
        lambda: backend.page(KEY),
    ):
        with pytest.raises(StorageError, match="s:messages"):
            call()
    assert dapr_server.records[HEAD].data == data
    record.data = whole
    assert said(backend) == ["0", "1"]


# -- time to live ------------------------------------------------------------------


def test_a_session_expires_as_a_whole_after_the_last_write(
    dapr_server: DaprSidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = make_backend(ttl=1000)
    now = 1_700_000_000
    monkeypatch.setattr("time.time", lambda: now)
    for number in range(20):
        backend.append(KEY, says(number))
        now += 900
        assert said(backend) == [str(n) for n in range(number + 1)]
    rewritten = [dapr_server.records[key].version for key in segments_of(dapr_server)]
    # Every segment is written anew about once in its time to live, not each time.
    assert 5 < max(rewritten) < 12
    now += 101
    assert backend.latest(KEY, None) == []
    backend.append(KEY, says("new"))
    assert said(backend) == ["new"]
    now += 3000 + 60 * 60
    assert [key for key in list(dapr_server.records) if dapr_server.get(key)] == []
    backend.close()


def test_a_ttl_that_is_set_or_lifted_later_holds_for_old_segments(
    dapr_server: DaprSidecar,
) -> None:
    for ttl, lives in ((None, True), (1000, False), (None, True)):
        backend = make_backend(ttl=ttl)
        write_singly(backend, 9)
        expires = [dapr_server.records[key].expires for key in segments_of(dapr_server)]
        assert [moment is None for moment in expires] == [lives] * len(expires)
        assert (dapr_server.records[HEAD].expires is None) is lives
        backend.close()
