"""Every door of the admin, walked as everybody: each is in the table below."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
from django.contrib import admin
from django.contrib.admin.models import LogEntry
from django.contrib.auth import get_user_model
from django.contrib.auth.models import Permission
from django.test import Client
from django.urls import URLPattern, reverse

from agent_sessions.models import AgentRun, AgentSession
from tests.support.admin_sites import SITES, World, at, text

pytestmark = [
    pytest.mark.django_db,
    pytest.mark.one_database,
    pytest.mark.urls("tests.support.admin_sites"),
]


@dataclass(frozen=True)
class Door:
    """A page or an action.

    `needs` are the rights without which it is shut, `asks` the hooks that are asked
    about the session behind it. Nobody passes one that needs `nobody`.
    """

    needs: frozenset[str]
    asks: frozenset[str] = frozenset()
    args: tuple[Any, ...] = ()


def door(needs: str, asks: str = "", *args: Any) -> Door:
    return Door(frozenset(needs.split()), frozenset(asks.split()), args)


# By the name of the URL. What hides a session shuts every door to it.
SESSION = "view queryset"
PAGES = {
    "agentsession_changelist": door("view_agentsession"),
    "agentsession_add": door("nobody"),
    "agentsession_overview": door("view_agentsession"),
    "agentsession_change": door("view_agentsession", SESSION),
    "agentsession_history": door("view_agentsession", SESSION),
    "agentsession_item": door(
        "view_agentsession read_agentsession", f"{SESSION} read", 1
    ),
    "agentsession_export": door(
        "view_agentsession read_agentsession", f"{SESSION} read", "json"
    ),
    "agentsession_clear": door(
        "view_agentsession clear_agentsession", f"{SESSION} clear"
    ),
    "agentsession_delete": door("delete_agentsession", f"{SESSION} delete"),
    "agentrun_changelist": door("view_agentrun"),
    "agentrun_add": door("nobody"),
    "agentrun_change": door("view_agentrun", SESSION),
    "agentrun_history": door("view_agentrun", SESSION),
    "agentrun_delete": door("nobody"),
}
ACTIONS = {
    "clear_history": door("view_agentsession clear_agentsession", f"{SESSION} clear"),
    "delete_selected": door(
        "view_agentsession delete_agentsession", f"{SESSION} delete"
    ),
    "export_json": door("view_agentsession read_agentsession", f"{SESSION} read"),
    "export_markdown": door("view_agentsession read_agentsession", f"{SESSION} read"),
}
# Pages that belong to no single row.
LISTS = {name for name in PAGES if name.endswith(("changelist", "add", "overview"))}

NAMES = [
    f"{right}_agentsession"
    for right in ("view", "read", "clear", "delete", "add", "change")
] + [f"{right}_agentrun" for right in ("view", "delete", "add", "change")]
VIEWS = ("view_agentsession", "view_agentrun")
PERSONS: dict[str, tuple[str, ...] | None] = {
    "anonymous": None,
    "a user": None,
    "staff": (),
    **{f"staff, {name}": (name,) for name in NAMES},
    **{f"viewer, {name}": (*VIEWS, name) for name in NAMES},
    "staff with all rights": tuple(NAMES),
    "superuser": tuple(NAMES),
}


@pytest.fixture
def world() -> World:
    return World()


def come_in(person: str) -> Client:
    client = Client()
    if person == "anonymous":
        return client
    users = get_user_model().objects
    rights = PERSONS[person]
    if person == "superuser":
        client.force_login(users.create_superuser("root"))
        return client
    user = users.create_user("someone", is_staff=rights is not None)
    user.user_permissions.set(Permission.objects.filter(codename__in=rights or ()))
    client.force_login(user)
    return client


def key_for(name: str, session: AgentSession) -> tuple[Any, ...]:
    if name in LISTS:
        return ()
    if name.startswith("agentrun"):
        return (AgentRun.objects.get(session=session).pk,)
    return (session.pk,)


def opens(response: Any) -> bool:
    return bool(response.status_code == 200)


def patterns(model: Any) -> Iterable[URLPattern]:
    return admin.site.get_model_admin(model).get_urls()


class TestTable:
    def test_has_every_page(self) -> None:
        found = [
            (pattern.name or "").removeprefix("agent_sessions_")
            for model in (AgentSession, AgentRun)
            for pattern in patterns(model)
        ]
        # Two have no name: they lead from an old address to the page of a row.
        assert sorted(found) == sorted([*PAGES, "", ""])

    def test_has_every_action(self, rf: Any) -> None:
        request = rf.get("/")
        request.user = get_user_model().objects.create_superuser("root")
        for model, expected in ((AgentSession, ACTIONS), (AgentRun, {})):
            actions = admin.site.get_model_admin(model).get_actions(request)
            assert set(actions) == set(expected)

    def test_has_every_model(self) -> None:
        """A model that is registered or shown inline has doors of its own."""
        ours = [
            model
            for model in admin.site._registry
            if model._meta.app_label == "agent_sessions"
        ]
        assert set(ours) == {AgentSession, AgentRun}
        for model in ours:
            assert admin.site.get_model_admin(model).inlines == ()


@pytest.mark.parametrize("person", PERSONS)
class TestRights:
    def test_pages(self, world: World, person: str) -> None:
        client, rights = come_in(person), PERSONS[person]
        for name, door in PAGES.items():
            address = at("admin", name, *key_for(name, world.ours), *door.args)
            response = client.get(address)
            if rights is None:
                assert response.status_code == 302, name
                assert "login" in response.headers["Location"]
            else:
                assert opens(response) is (door.needs <= set(rights)), name
                assert opens(response) or response.status_code == 403, name
                if "read_agentsession" not in rights:
                    self.tells_nothing(response, name)

    def test_what_is_sent_there(self, world: World, person: str) -> None:
        client, rights = come_in(person), set(PERSONS[person] or ())
        for name, door in PAGES.items():
            if name in {"agentsession_clear", "agentsession_delete"}:
                continue
            place = at("admin", name, *key_for(name, world.ours), *door.args)
            client.post(place, {"post": "yes", "count": "1", "title": "Mine"})
            row = AgentSession.objects.get(pk=world.ours.pk)
            assert (row.item_count, row.title) == (2, "First line of ours-id"), name
        for name, left in (("agentsession_clear", [0]), ("agentsession_delete", [])):
            client.post(at("admin", name, world.ours.pk), {"post": "yes", "count": "1"})
            rows = AgentSession.objects.filter(pk=world.ours.pk)
            is_done = PAGES[name].needs <= rights
            found = list(rows.values_list("item_count", flat=True))
            assert (found == left) is is_done, name

    @pytest.mark.parametrize("action", ACTIONS)
    def test_actions(self, world: World, person: str, action: str) -> None:
        client = come_in(person)
        data = {"action": action, "_selected_action": [world.ours.pk], "post": "yes"}
        response = client.post(
            at("admin", "agentsession_changelist"), {**data, "count": "1"}
        )
        is_done = ACTIONS[action].needs <= set(PERSONS[person] or ())
        rows = AgentSession.objects.filter(pk=world.ours.pk)
        left = {"clear_history": [0], "delete_selected": []}.get(action, [2])
        found = list(rows.values_list("item_count", flat=True))
        assert found == (left if is_done else [2])
        assert response.streaming is (is_done and action.startswith("export"))
        assert LogEntry.objects.exists() is is_done

    def tells_nothing(self, response: Any, name: str) -> None:
        html = text(response)
        for said in ("First line", "An answer", "ours-argument", "ours-usage"):
            assert said not in html, name


@pytest.mark.parametrize("rule", ["view", "queryset", "read", "clear", "delete"])
class TestRules:
    """Someone with all rights, where the project's admin refuses one session."""

    def test_pages(self, world: World, rule: str) -> None:
        for name, door in PAGES.items():
            if "nobody" in door.needs:
                continue
            ours = at(rule, name, *key_for(name, world.ours), *door.args)
            theirs = at(rule, name, *key_for(name, world.theirs), *door.args)
            response = world.client.get(ours)
            assert opens(response), name
            assert self.is_silent(rule, response) or rule in {"clear", "delete"}, name
            refused = rule in door.asks
            response = world.client.get(theirs)
            assert opens(response) is (name in LISTS or not refused), name
            if rule == "read":
                html = text(response)
                assert "First line of theirs" not in html, name
                assert "theirs-argument" not in html, name

    def test_what_is_sent_there(self, world: World, rule: str) -> None:
        for name in ("agentsession_clear", "agentsession_delete"):
            place = at(rule, name, world.theirs.pk)
            world.client.post(place, {"post": "yes", "count": "1"})
            rows = AgentSession.objects.filter(pk=world.theirs.pk)
            found = list(rows.values_list("item_count", flat=True))
            assert (found == [2]) is (rule in PAGES[name].asks), name
            if not rows:
                return
            if found == [0]:
                rows.update(item_count=2)

    @pytest.mark.parametrize("action", ACTIONS)
    def test_actions(self, world: World, rule: str, action: str) -> None:
        selected = [world.theirs.pk]
        response = world.client.post(
            at(rule, "agentsession_changelist"),
            {"action": action, "_selected_action": selected, "post": "yes", "count": 1},
        )
        refused = rule in ACTIONS[action].asks
        rows = AgentSession.objects.filter(pk=world.theirs.pk)
        left = {"clear_history": [0], "delete_selected": []}.get(action, [2])
        found = list(rows.values_list("item_count", flat=True))
        assert found == ([2] if refused else left)
        assert response.streaming is (not refused and action.startswith("export"))
        assert LogEntry.objects.exists() is not refused

    def is_silent(self, rule: str, response: Any) -> bool:
        """Return whether a page that is open says nothing of what is refused."""
        html = text(response)
        if rule == "read":
            return "First line of theirs" not in html
        return "theirs" not in html and ">them<" not in html


def test_the_rules_are_those_of_the_sites() -> None:
    asked = {
        rule for door in (*PAGES.values(), *ACTIONS.values()) for rule in door.asks
    }
    assert asked == {"view", "queryset", "read", "clear", "delete"}
    assert asked <= set(SITES)


def test_pages_around_ours_quote_nothing(world: World) -> None:
    """Pages of Django's own, that name sessions: recent actions, deleting an owner."""
    client = come_in("superuser")
    user = get_user_model().objects.get(username="root")
    for row in (world.ours, world.theirs):
        client.post(at("admin", "agentsession_clear", row.pk), {"post": "yes"})
        client.get(at("admin", "agentsession_change", row.pk))
    user.is_superuser = False
    user.save()
    names = ("view_agentsession", "delete_agentsession", "view_user", "delete_user")
    user.user_permissions.set(Permission.objects.filter(codename__in=names))
    owner = reverse("admin:auth_user_delete", args=(world.us.pk,))
    for place in (reverse("admin:index"), owner):
        html = text(client.get(place))
        assert "ours-id" in html
        for said in ("First line", "An answer", "ours-argument", "ours-usage"):
            assert said not in html
