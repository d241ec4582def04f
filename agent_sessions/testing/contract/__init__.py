"""Everything the SDK and this project ask of a session, as one test mixin."""

from __future__ import annotations

from agent_sessions.testing.contract.approvals import ApprovalCases
from agent_sessions.testing.contract.concurrency import ConcurrencyCases
from agent_sessions.testing.contract.endings import EndingCases
from agent_sessions.testing.contract.fidelity import FidelityCases
from agent_sessions.testing.contract.ids import IdCases
from agent_sessions.testing.contract.owners import OwnerCases
from agent_sessions.testing.contract.popping import PoppingCases
from agent_sessions.testing.contract.processes import ProcessCases
from agent_sessions.testing.contract.reading import ReadingCases
from agent_sessions.testing.contract.runs import RunCases
from agent_sessions.testing.contract.shape import ShapeCases
from agent_sessions.testing.contract.sync import SyncCases
from agent_sessions.testing.contract.wrappers import WrapperCases
from agent_sessions.testing.contract.writing import WritingCases

__all__ = ["SessionContract"]


class SessionContract(
    ShapeCases,
    ReadingCases,
    FidelityCases,
    WritingCases,
    PoppingCases,
    IdCases,
    OwnerCases,
    SyncCases,
    ConcurrencyCases,
    ProcessCases,
    RunCases,
    EndingCases,
    ApprovalCases,
    WrapperCases,
):
    """Test a session store against the contract of the SDK and of this project.

    Give `make_session`, set what the store supports, and fill the hooks that this
    needs; cases of what is not supported are not collected:

        class TestMyStore(SessionContract):
            async def make_session(self, session_id, **options):
                return MySession(session_id, **options)

    The cases are plain functions to the runner: pytest runs them as they are, with
    or without an asyncio plugin, and so does unittest where the class is a TestCase
    too. Marks and fixtures on the class apply as usual.
    """
