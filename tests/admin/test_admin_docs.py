"""What docs/admin.md says, held against the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from django.contrib import admin
from django.contrib.auth.models import Permission

from agent_sessions.admin import AgentSessionAdmin, CappedPaginator
from agent_sessions.admin.exporting import MOST
from agent_sessions.admin.overview import RANGES
from agent_sessions.admin.transcript import PAGE_LENGTH, RAW_LENGTH
from agent_sessions.models import AgentSession
from agent_sessions.transcript.parts import IMAGE_BYTES, PART_LENGTH
from agent_sessions.transfer.export import FORMAT

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "admin.md").read_text(encoding="utf-8")
WORDS = " ".join(TEXT.split())


@pytest.mark.django_db
@pytest.mark.one_database
def test_the_permissions_exist() -> None:
    table = TEXT.partition("| permission |")[2].partition("\n\n")[0]
    named = set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE))
    assert len(named) == 5
    rows = Permission.objects.filter(content_type__app_label="agent_sessions")
    assert named <= set(rows.values_list("codename", flat=True))
    own = {name for name, _words in AgentSession._meta.permissions}
    assert own <= named


def test_the_numbers_are_those_of_the_code() -> None:
    for text in (
        f"newest {PAGE_LENGTH} items",
        f"over {PART_LENGTH:,} characters",
        f"over {RAW_LENGTH:,} characters",
        f"up to {IMAGE_BYTES // 1_000_000} MB",
        f"up to {MOST} from the list",
        f"counted to {CappedPaginator.limit:,} at most",
        f"format `{FORMAT}`",
        "last {}, {} or {} days".format(*sorted(RANGES)),
    ):
        assert text in WORDS, text


def test_the_example_registers_a_subclass() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    try:
        exec(code, {})
        ours = admin.site.get_model_admin(AgentSession)
        assert type(ours).__name__ == "OurSessionAdmin"
        assert ours.list_per_page == 20
    finally:
        admin.site.unregister(AgentSession)
        admin.site.register(AgentSession, AgentSessionAdmin)


def test_the_page_is_found() -> None:
    assert re.search(r"^admin$", (DOCS / "index.md").read_text(), re.MULTILINE)
