"""Import sessions from other stores; write and read our own export."""

from __future__ import annotations

from agent_sessions.transfer.export import FORMAT, export_session
from agent_sessions.transfer.import_.importer import Importer, Report
from agent_sessions.transfer.import_.owners import (
    OneOwner,
    Owners,
    OwnersFromFile,
    OwnersFromIds,
)
from agent_sessions.transfer.import_.records import (
    ImportProblem,
    Source,
    UnreadableSource,
)
from agent_sessions.transfer.import_.sources import KINDS, open_source

__all__ = [
    "FORMAT",
    "KINDS",
    "ImportProblem",
    "Importer",
    "OneOwner",
    "Owners",
    "OwnersFromFile",
    "OwnersFromIds",
    "Report",
    "Source",
    "UnreadableSource",
    "export_session",
    "open_source",
]
