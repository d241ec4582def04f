"""A conformance kit for session stores: inherit SessionContract and run pytest.

Needs the extra `testing`, and imports the SDK; no Django settings are read.
"""

from __future__ import annotations

from agent_sessions.exceptions import extra

with (
    extra("testing", "pytest", needed_by=__name__),
    extra("testing", "hypothesis", needed_by=__name__),
):
    from agent_sessions.testing.fidelity import FidelityCases
    from agent_sessions.testing.reading import (
        IdCases,
        OwnerCases,
        ReadingCases,
        ShapeCases,
    )
    from agent_sessions.testing.runs import ApprovalCases, RunCases, WrapperCases
    from agent_sessions.testing.writing import (
        ConcurrencyCases,
        PoppingCases,
        WritingCases,
    )

__all__ = ["SessionContract"]


class SessionContract(
    ShapeCases,
    ReadingCases,
    FidelityCases,
    WritingCases,
    PoppingCases,
    IdCases,
    OwnerCases,
    ConcurrencyCases,
    RunCases,
    ApprovalCases,
    WrapperCases,
):
    """Test a session store against the contract of the SDK and of this project.

    Define `make_session`, set what the store supports, and define the hooks that this
    needs. Cases of what is not supported are not collected:

        class TestMyStore(SessionContract):
            async def make_session(self, session_id, **options):
                return MySession(session_id, **options)

    pytest runs the cases with or without an asyncio plugin; marks and fixtures on the
    class apply as usual. A case that is set to None is left out.
    """
