"""Who may see and do what: metadata and contents are different secrets.

A right says what someone may do at all, a hook of a ModelAdmin says it of one row. A
project that registers a subclass has hooks of its own: every door asks them with the
row, and what may not be viewed does not exist.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, ClassVar

from django.contrib import admin, messages
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.contrib.admin.utils import unquote
from django.contrib.admin.views.main import ChangeList
from django.core.exceptions import BadRequest, PermissionDenied
from django.core.paginator import Paginator
from django.db import router
from django.db.models import Q, QuerySet
from django.http import HttpRequest, HttpResponseBase
from django.template.response import SimpleTemplateResponse
from django.urls import URLPattern
from django.utils.translation import gettext_lazy as _
from django.utils.translation import ngettext

from agent_sessions.admin.addresses import as_key
from agent_sessions.admin.layout import grouped
from agent_sessions.admin.lists import (
    CappedPaginator,
    RuledList,
    declared,
    is_indexed,
    names_lookup,
    reaches_contents,
    words_of,
)
from agent_sessions.exceptions import InvalidBackend, MissingExtra
from agent_sessions.handler import DEFAULT_ALIAS, sessions
from agent_sessions.models import AgentSession
from agent_sessions.reports import guarded

if TYPE_CHECKING:
    _ModelAdmin = admin.ModelAdmin[Any]
else:
    # Generic for type checkers alone.
    _ModelAdmin = admin.ModelAdmin

# Rows that a project's hook is asked for where rows are counted.
MOST_ASKED = 1_000

Rows = QuerySet[AgentSession]


def database() -> str:
    """Return the alias of DATABASES whose rows the admin shows.

    It is where the default backend writes. A replica may lag behind, so no router is
    asked where to read.
    """
    try:
        return sessions[DEFAULT_ALIAS].directory.using
    except (InvalidBackend, MissingExtra):
        # Told by the system checks; the rows that there are can still be seen.
        return router.db_for_write(AgentSession)


def may(request: HttpRequest, right: str, model: str = "agentsession") -> bool:
    """Return whether the reader has exactly this right on a model.

    Django's own look-ups let those who may change also view; nobody changes these.
    """
    return request.user.has_perm(f"agent_sessions.{right}_{model}")


def hides(model_admin: Any, request: HttpRequest, row: Any) -> bool:
    """Return whether a hook refuses one row to someone who may view others."""
    view = model_admin.has_view_permission
    return view(request) and not view(request, row)


def has_own(model_admin: Any, hook: str, *bases: type) -> bool:
    """Return whether a hook is other than those of these classes: a project's own."""
    function = getattr(getattr(model_admin, hook), "__func__", None)
    return function not in [getattr(base, hook) for base in bases]


def narrowed(model_admin: Any, request: HttpRequest) -> QuerySet[Any] | None:
    """Return the sessions that a ModelAdmin narrows its pages to; None if to none.

    All of them as a subquery would cost a list of a million runs its index.
    """
    rows: QuerySet[Any] = model_admin.get_queryset(request).order_by()
    plain = AgentSession.objects.all().query
    return None if rows.query.where == plain.where else rows


def _guarded_view(view: Any) -> Any:
    """Guard a view, and its page, which Django renders after the view has returned."""
    guarded_view = guarded(view)

    @wraps(view)
    def call(*args: Any, **kwargs: Any) -> HttpResponseBase:
        response: Any = guarded_view(*args, **kwargs)
        if isinstance(response, SimpleTemplateResponse):
            response.render = guarded(response.render)  # type: ignore[method-assign]
        return response  # type: ignore[no-any-return]

    return call


class RuledAdmin(_ModelAdmin):
    """Rows to look at, asked for by rules: what sessions and runs have in common.

    Errors of its pages, Django's own too, are reported without what they show.
    """

    list_per_page = 50
    paginator = CappedPaginator
    # Columns that an index has in the order of other columns.
    sorted_as: ClassVar[dict[str, str]] = {}
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER

    class Media:
        css = {"all": ("agent_sessions/admin.css",)}
        js = ("agent_sessions/admin.js",)

    @property
    def urls(self) -> list[URLPattern]:
        urls = self.get_urls()
        for each in urls:
            each.callback = _guarded_view(each.callback)
        return urls

    # -- rules ---------------------------------------------------------------------

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_view_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        # Only the right of that name: Django's also takes the one to change.
        model: Any = self.opts.concrete_model
        return may(request, "view", model._meta.model_name)

    def is_hidden(self, request: HttpRequest, obj: Any) -> bool:
        """Return whether a row does not exist for this reader, who may view others."""
        return hides(self, request, obj)

    def asks_rows(self) -> bool:
        """Return whether a hook of a project's own may hide single rows."""
        return has_own(self, "has_view_permission", RuledAdmin)

    def shown(self, request: HttpRequest, rows: Iterable[Any]) -> list[Any]:
        """Leave out the rows that do not exist for this reader."""
        if not self.asks_rows():
            return list(rows)
        return [row for row in rows if not self.is_hidden(request, row)]

    def reads_all(self, request: HttpRequest) -> bool:
        """Return whether the reader may read what was said in every row of the list."""
        raise NotImplementedError

    def withholds(self, request: HttpRequest, *paths: str) -> bool:
        """Return whether one of these paths leads to what the reader may not read."""
        return any(
            reaches_contents(self.model, path) for path in paths
        ) and not self.reads_all(request)

    # -- lists ---------------------------------------------------------------------

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:
        return RuledList

    def get_paginator(
        self, request: HttpRequest, queryset: Any, *args: Any, **kwargs: Any
    ) -> Paginator[Any]:
        paginator = super().get_paginator(request, queryset, *args, **kwargs)
        if isinstance(paginator, CappedPaginator):
            # Suggestions of a field (autocomplete_fields) take their rows from it.
            paginator.shown = partial(self.shown, request)
        return paginator

    def get_search_fields(self, request: HttpRequest) -> Any:
        found = super().get_search_fields(request)
        return [
            path for path in found if not self.withholds(request, path.lstrip("^=@"))
        ]

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        """Search each field by itself: all of them at once would read every row."""
        # PostgreSQL takes no NUL, and no row has one.
        term = search_term.replace("\x00", "").strip()
        if not term:
            return queryset, False
        # The same letters, composed or not.
        terms = {unicodedata.normalize(form, term) for form in ("NFC", "NFD")} | {term}
        found = Q(pk__in=())
        for path in self.get_search_fields(request):
            found |= self.search(queryset, path, sorted(terms))
        return queryset.filter(found), False

    def search(self, rows: QuerySet[Any], path: str, terms: list[str]) -> Q:
        """Find what one of `search_fields` finds; here, as Django does."""
        prefixes = {"^": "__istartswith", "=": "__iexact", "@": "__search"}
        lookup = path.lstrip("^=@") + prefixes.get(path[0], "")
        if path == lookup and not names_lookup(self.model, path):
            lookup += "__icontains"
        found = Q(pk__in=())
        for term in terms:
            found |= Q(*((lookup, word) for word in words_of(term)))
        # A row of another table may be found more than once.
        rows = self.model._default_manager.using(rows.db).filter(found)
        return Q(pk__in=rows.values("pk"))

    def lookup_allowed(self, lookup: str, value: Any, request: Any = None) -> bool:
        """Allow the values of columns with an index, and the filters that it has.

        What a value is plays no part, so that a refusal tells nothing about rows.
        """
        if is_indexed(self.model, lookup):
            return True
        return request is not None and any(
            lookup == name and not self.withholds(request, path)
            for name, path in declared(self, request)
        )

    def changelist_view(
        self, request: HttpRequest, extra_context: dict[str, Any] | None = None
    ) -> Any:
        for key in request.POST.getlist(ACTION_CHECKBOX_NAME):
            if as_key(key) is None:
                raise BadRequest("The keys of selected rows are numbers.")
        return super().changelist_view(request, extra_context)

    @admin.display(description=_("tokens (in / out)"), empty_value="-")
    def tokens(self, obj: Any) -> str | None:
        if not (obj.input_tokens or obj.output_tokens):
            return None
        return f"{grouped(obj.input_tokens)} / {grouped(obj.output_tokens)}"

    # -- one row -------------------------------------------------------------------

    def get_object(
        self, request: HttpRequest, object_id: str, from_field: str | None = None
    ) -> Any:
        # Django takes an empty name for a field's.
        obj = super().get_object(request, object_id, from_field or None)
        return None if obj is None or self.is_hidden(request, obj) else obj

    def get_fieldsets(self, request: HttpRequest, obj: Any = None) -> Any:
        # The page has no form; its template shows everything.
        return ()

    def counts(self, obj: Any, *names: str) -> list[tuple[Any, str]]:
        """Return columns with numbers as a page shows them, each with its name."""
        fields: list[Any] = [self.opts.get_field(name) for name in names]
        return [
            (field.verbose_name, grouped(getattr(obj, field.name))) for field in fields
        ]


class SessionRules(RuledAdmin):
    """The hooks of sessions. A project's subclass may refuse single sessions.

    Each is asked twice: without a session, may the reader do so at all; with one, may
    the reader do so to this one. Without `view`, no other hook is of use.
    """

    def has_read_permission(
        self, request: HttpRequest, obj: AgentSession | None = None
    ) -> bool:
        """Return whether the reader may see what was said."""
        return self.has_view_permission(request, obj) and may(request, "read")

    def has_clear_permission(
        self, request: HttpRequest, obj: AgentSession | None = None
    ) -> bool:
        """Return whether the reader may empty sessions."""
        return may(request, "clear")

    def has_delete_permission(
        self, request: HttpRequest, obj: AgentSession | None = None
    ) -> bool:
        # Those who may only delete view nothing.
        if obj is not None and self.is_hidden(request, obj):
            return False
        return super().has_delete_permission(request, obj)

    def allows(
        self, request: HttpRequest, right: str, obj: AgentSession | None
    ) -> bool:
        """Return whether the reader may view a session and do this to it."""
        hook: Any = getattr(self, f"has_{right}_permission")
        return self.has_view_permission(request, obj) and hook(request, obj)

    def get_allowed(
        self, request: HttpRequest, object_id: str, right: str
    ) -> AgentSession | None:
        """Find a session to do this to. Raises PermissionDenied."""
        obj: AgentSession | None = self.get_object(request, unquote(object_id))
        if not self.allows(request, right, obj):
            raise PermissionDenied
        return obj

    def few(
        self, request: HttpRequest, sessions: Rows | list[AgentSession], most: int
    ) -> list[AgentSession]:
        """Read the sessions of an action; too many are none, which is told."""
        if isinstance(sessions, list) or not sessions[most : most + 1].exists():
            return list(sessions)
        text = ngettext(
            "At most %d session can be chosen for this.",
            "At most %d sessions can be chosen for this. Filter the list.",
            most,
        )
        self.message_user(request, text % most, messages.ERROR)
        return []

    def permitted(
        self, request: HttpRequest, rows: Iterable[AgentSession], right: str
    ) -> list[AgentSession]:
        """Leave out the sessions that a hook refuses; return how many those are."""
        seen = self.shown(request, rows)
        if not self.has_rules("view", right):
            return seen
        kept = [row for row in seen if self.allows(request, right, row)]
        if left := len(seen) - len(kept):
            text = ngettext(
                "%d session was left out: you may not do this to it.",
                "%d sessions were left out: you may not do this to them.",
                left,
            )
            self.message_user(request, text % left, messages.WARNING, "", True)
        return kept

    def shown(self, request: HttpRequest, rows: Iterable[Any]) -> list[Any]:
        kept = super().shown(request, rows)
        asks, reads = self.has_rules("view", "read"), self.has_read_permission(request)
        for row in kept:
            if not (self.allows(request, "read", row) if asks else reads):
                # Whatever a column of the list shows, it can't show this.
                row.title = ""
        return kept

    def reads_all(self, request: HttpRequest) -> bool:
        # A database can't ask a project's hooks.
        return self.has_read_permission(request) and not self.has_rules("view", "read")

    def has_rules(self, *rights: str) -> bool:
        """Return whether a subclass has hooks of its own, which may refuse a row."""
        return any(
            has_own(self, f"has_{right}_permission", SessionRules) for right in rights
        )

    def label(self, request: HttpRequest, row: AgentSession) -> str:
        """Name a session for this reader: a title quotes the first message."""
        if row.title and self.allows(request, "read", row):
            return str(row.title)
        return str(row.session_id)
