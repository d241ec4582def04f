"""What DaprClient takes, of the modules that Dapr's own documentation imports.

Their names begin with an underscore, and there are no others. A test pins them.
"""

from __future__ import annotations

from dapr.clients.grpc._request import TransactionalStateOperation
from dapr.clients.grpc._state import Concurrency, Consistency, StateOptions


def save_options(consistency: str, *, first_write: bool) -> StateOptions:
    """Return the options of a save that others' writes refuse, or that wins."""
    kind = Concurrency.first_write if first_write else Concurrency.last_write
    return StateOptions(Consistency[consistency], kind)


def upsert(
    key: str, data: bytes, etag: str, metadata: dict[str, str]
) -> TransactionalStateOperation:
    """Return a write that is a part of a transaction."""
    return TransactionalStateOperation(
        key=key, data=data, etag=etag or None, metadata=metadata
    )
