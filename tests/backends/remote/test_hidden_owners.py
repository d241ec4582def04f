"""People whom the default manager leaves out still own their sessions."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import User, UserManager
from django.core.management import CommandError, call_command
from django.urls import reverse

from agent_sessions import DjangoSession
from agent_sessions.models import AgentSession
from tests.support.admin_pages import LIST, page, staff
from tests.support.exports import read_export

pytestmark = [pytest.mark.django_db, pytest.mark.one_database]


class LiveManager(UserManager[User]):
    """Leave out who was deleted softly, as projects do; names ignore case."""

    def get_queryset(self) -> Any:
        return super().get_queryset().filter(is_active=True)

    def get_by_natural_key(self, username: str | None) -> User:
        return self.get(username__iexact=username)


@pytest.fixture(autouse=True)
def _soft_deletion() -> Iterator[None]:
    manager: Any = LiveManager()
    options: Any = User._meta
    User.add_to_class("live", manager)
    User._meta.default_manager_name = "live"
    options._expire_cache()
    yield
    User._meta.default_manager_name = None
    User._meta.local_managers.remove(manager)
    del User.live  # type: ignore[attr-defined]
    options._expire_cache()


@pytest.fixture
def ann() -> User:
    user = User.objects.create_user("ann", email="ann@example.com")
    DjangoSession("hers", user=user).sync.add_items([{"role": "user", "content": "x"}])
    user.is_active = False
    user.save()
    assert not User._default_manager.filter(pk=user.pk).exists()
    return user


def run(command: str, *args: str, **options: Any) -> str:
    out = io.StringIO()
    call_command(command, *args, stdout=out, stderr=io.StringIO(), **options)
    return out.getvalue()


def test_they_are_erased(ann: User) -> None:
    receipt = json.loads(run("erase_agent_user", "ann", interactive=False))
    assert (receipt["user"], receipt["complete"]) == ("ann", True)
    assert not AgentSession.objects.exists()


def test_they_are_listed_exported_checked_and_cleared(ann: User) -> None:
    assert json.loads(run("list_agent_sessions", user="ann", json=True))
    assert read_export(run("export_agent_sessions", user="ann"))[0]["session"]["id"]
    assert json.loads(run("check_agent_sessions", user="ann", json=True))
    run("clear_agent_sessions", user="ann", delete=True, interactive=False)
    assert not AgentSession.objects.exists()


@pytest.mark.parametrize(
    "owner",
    [("--user", "ann"), ("--user-from", "{username}:*"), ()],
)
def test_an_import_finds_them(
    ann: User, owner: tuple[str, ...], tmp_path: Path
) -> None:
    file = tmp_path / "all.jsonl"
    AgentSession.objects.update(session_id="ann:1")
    run("export_agent_sessions", output=str(file))
    AgentSession.objects.all().delete()
    run("import_agent_sessions", "export", "--from", str(file), *owner)
    assert AgentSession.objects.get().user_id == ann.pk


def test_the_admin_searches_by_their_names(ann: User) -> None:
    html = page(staff("view"), f"{reverse(LIST)}?q=ann")
    assert "hers" in html
    assert "ann" in html


def test_the_rule_of_the_project_for_names_still_counts() -> None:
    User.objects.create_user("Bob")
    assert run("list_agent_sessions", user="bob", json=True).strip() == "[]"


def test_the_exact_name_comes_first(ann: User) -> None:
    # Somebody else may have taken nearly the same name since.
    other = User.objects.create_user("Ann")
    DjangoSession("his", user=other).sync.add_items([{"role": "user", "content": "x"}])
    run("erase_agent_user", "ann", interactive=False)
    assert AgentSession.objects.get().user_id == other.pk


def test_an_unknown_name_is_still_an_error(ann: User) -> None:
    with pytest.raises(CommandError, match="There is no user 'nobody'"):
        run("erase_agent_user", "nobody", interactive=False)
