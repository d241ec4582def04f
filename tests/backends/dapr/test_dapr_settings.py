"""The DAPR_* variables, which the package's own client obeys too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from agent_sessions.exceptions import StorageError
from tests.backends.dapr.test_dapr_faults import once
from tests.servers.dapr import DaprSidecar
from tests.support.dapr_stores import HEAD, KEY, make_backend, said, says

pytestmark = pytest.mark.one_database

INBOUND = "DAPR_GRPC_MAX_INBOUND_MESSAGE_SIZE_BYTES"
LARGE = "x" * 5_000_000


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> Iterator[DaprSidecar]:
    """A sidecar that takes large records."""
    sidecar = DaprSidecar()
    sidecar.max_bytes = 64 * 1024 * 1024
    for name, value in sidecar.environment.items():
        monkeypatch.setenv(name, value)
    sidecar.start()
    yield sidecar
    sidecar.stop()


def test_records_may_be_as_large_as_the_client_is_told(
    wide: DaprSidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(INBOUND, str(32 * 1024 * 1024))
    backend = make_backend()
    backend.append(KEY, says("a", LARGE))
    assert said(backend) == ["a", LARGE]
    assert backend.pop(KEY) == says(LARGE)[0]
    assert said(backend) == ["a"]
    backend.close()


def test_what_could_not_be_read_again_is_not_written(wide: DaprSidecar) -> None:
    backend = make_backend()
    backend.append(KEY, says("a"))
    before = dict(wide.records)
    with pytest.raises(StorageError, match=rf"nothing was written.*{INBOUND}"):
        backend.append(KEY, says("b", LARGE))
    assert wide.records == before
    backend.append(KEY, says("c", "x" * 3_900_000))
    assert len(said(backend)) == 3
    assert backend.pop(KEY) == says("x" * 3_900_000)[0]
    assert backend.pop(KEY) == says("c")[0]
    backend.close()


def test_the_grpc_endpoint(
    dapr_server: DaprSidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAPR_GRPC_ENDPOINT", dapr_server.address)
    monkeypatch.setenv("DAPR_GRPC_PORT", "1")
    backend = make_backend()
    backend.append(KEY, says("a"))
    assert said(backend) == ["a"]
    backend.close()


def test_the_host_of_the_runtime(
    dapr_server: DaprSidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAPR_RUNTIME_HOST", "localhost")
    backend = make_backend()
    backend.append(KEY, says("a"))
    assert said(backend) == ["a"]
    backend.close()


def test_the_http_endpoint(
    dapr_server: DaprSidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    http = f"http://127.0.0.1:{dapr_server.http_port}"
    monkeypatch.setenv("DAPR_HTTP_ENDPOINT", http)
    monkeypatch.setenv("DAPR_HTTP_PORT", "1")
    backend = make_backend(health_timeout=5)
    backend.append(KEY, says("a"))
    backend.close()


@pytest.mark.parametrize(
    ("options", "seconds"), [({}, "1"), ({"health_timeout": 0.2}, "0.2")]
)
def test_the_health_timeout(
    dapr_server: DaprSidecar,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    seconds: str,
) -> None:
    """An option of the backend counts for more."""
    monkeypatch.setenv("DAPR_HEALTH_TIMEOUT", "1")
    monkeypatch.setenv("DAPR_HTTP_PORT", "9")
    backend = make_backend(**options)
    with pytest.raises(StorageError, match=rf"health check.* within {seconds} s"):
        backend.latest(KEY, None)
    backend.close()


def test_the_timeout_of_a_request(
    dapr_server: DaprSidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAPR_API_TIMEOUT_SECONDS", "0.2")
    backend = make_backend()
    backend.append(KEY, says("a"))
    dapr_server.faults.delay = 0.6
    with pytest.raises(StorageError, match="DEADLINE_EXCEEDED"):
        backend.latest(KEY, None)
    backend.close()


def test_how_often_a_read_is_tried(
    dapr_server: DaprSidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = ["UNAVAILABLE"] * 6

    def interfere(name: str, keys: list[str], done: bool) -> str | None:
        return left.pop() if left and name == "GetState" and not done else None

    backend = make_backend()
    backend.append(KEY, says("a"))
    dapr_server.faults.interfere = interfere
    with pytest.raises(StorageError, match="UNAVAILABLE"):
        backend.latest(KEY, None)
    backend.close()
    left[:] = ["UNAVAILABLE"] * 6
    monkeypatch.setenv("DAPR_API_MAX_RETRIES", "7")
    patient = make_backend()
    assert patient.latest(KEY, None) == says("a")
    left[:] = ["UNAVAILABLE"] * 6
    monkeypatch.setenv("DAPR_API_MAX_RETRIES", "-1")
    endless = make_backend()
    assert endless.latest(KEY, None) == says("a")
    patient.close()
    endless.close()


@pytest.mark.parametrize("retries", ["0", "3"])
def test_a_write_that_was_tried_again_on_its_way_is_done_once(
    dapr_server: DaprSidecar,
    monkeypatch: pytest.MonkeyPatch,
    retries: str,
) -> None:
    """The second try, of a client or of the sidecar's policy, finds its own first."""
    monkeypatch.setenv("DAPR_API_MAX_RETRIES", retries)
    backend = make_backend(segment_size=2)
    for number in range(5):
        dapr_server.faults.interfere = once("ABORTED", applied=True)
        backend.append(KEY, says(number))
    assert said(backend) == list("01234")
    for number in (4, 3, 2):
        dapr_server.faults.interfere = once("ABORTED", applied=True)
        assert backend.pop(KEY) == says(number)[0]
    assert said(backend) == list("01")
    assert HEAD in dapr_server.records
    backend.close()
