"""The list of sessions, and one session as a transcript."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.contrib.admin.utils import unquote
from django.contrib.auth import get_user_model
from django.core.exceptions import PermissionDenied
from django.http import Http404, HttpRequest, HttpResponse
from django.urls import NoReverseMatch, URLPattern, path, reverse
from django.utils.formats import number_format
from django.utils.html import format_html
from django.utils.translation import gettext_lazy as _

from agent_sessions import clearing
from agent_sessions.admin.clearing import ClearingMixin, Rows
from agent_sessions.admin.filters import StoreFilter
from agent_sessions.admin.paginator import CappedPaginator
from agent_sessions.exceptions import AgentSessionError
from agent_sessions.items import clean_text
from agent_sessions.models import AgentSession
from agent_sessions.transcript import join

PAGE_LENGTH = 100


@admin.register(AgentSession)
class AgentSessionAdmin(ClearingMixin):
    """Sessions to look at: found by their metadata, read with a right of its own."""

    list_filter = (
        StoreFilter,
        "state",
        ("active_on", admin.DateFieldListFilter),
        ("user", admin.EmptyFieldListFilter),
    )
    list_select_related = ("user",)
    list_per_page = 50
    # The index serves this order; the time of last activity has none, see the model.
    ordering = ("-active_on", "-pk")
    sortable_by = ("item_count", "updated_at", "created_at")
    paginator = CappedPaginator
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER

    class Media:
        css = {"all": ("agent_sessions/admin.css",)}
        js = ("agent_sessions/admin.js",)

    # -- permissions ---------------------------------------------------------------

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(
        self, request: HttpRequest, obj: AgentSession | None = None
    ) -> bool:
        return False

    # -- list ----------------------------------------------------------------------

    def get_queryset(self, request: HttpRequest) -> Rows:
        return super().get_queryset(request).defer("metadata")

    def get_list_display(self, request: HttpRequest) -> tuple[str, ...]:
        # A title quotes the first message.
        name = "name" if self.has_read_permission(request) else "session_id"
        return (
            name,
            "user",
            "store",
            "item_count",
            "tokens",
            "state_in_words",
            "updated_at",
            "created_at",
        )

    def get_search_fields(self, request: HttpRequest) -> tuple[str, ...]:
        owner = f"user__{get_user_model().USERNAME_FIELD}__exact"
        titles = ("title",) if self.has_read_permission(request) else ()
        return ("session_id__startswith", owner, *titles)

    search_help_text = _(
        "Session id, exact user name, or words of the title. Message texts are not "
        "searched."
    )

    @admin.display(description=_("title"))
    def name(self, obj: AgentSession) -> str:
        if obj.title:
            return str(obj.title)
        text = obj.session_id if obj.item_count else _("(empty)")
        return format_html('<span class="as-quiet">{}</span>', text)

    @admin.display(description=_("store"))
    def store(self, obj: AgentSession) -> str:
        return str(obj.backend)

    @admin.display(description=_("tokens (in / out)"), empty_value="-")
    def tokens(self, obj: AgentSession) -> str | None:
        if not (obj.input_tokens or obj.output_tokens):
            return None
        return f"{_grouped(obj.input_tokens)} / {_grouped(obj.output_tokens)}"

    @admin.display(description=_("state"))
    def state_in_words(self, obj: AgentSession) -> str:
        known = obj.state if obj.state in AgentSession.State.values else "unknown"
        return format_html(
            '<span class="as-state as-state-{}">{}</span>',
            known,
            obj.get_state_display(),
        )

    # -- one session ---------------------------------------------------------------

    def get_urls(self) -> list[URLPattern]:
        name = f"{self.opts.app_label}_{self.opts.model_name}"
        wrap = self.admin_site.admin_view
        own = [
            path(
                "<path:object_id>/clear/", wrap(self.clear_view), name=f"{name}_clear"
            ),
            path(
                "<path:object_id>/items/<int:position>/",
                wrap(self.item_view),
                name=f"{name}_item",
            ),
        ]
        return [*own, *super().get_urls()]

    def get_fieldsets(self, request: HttpRequest, obj: Any = None) -> Any:
        # The page has no form; its template shows header and transcript.
        return ()

    def render_change_form(
        self,
        request: HttpRequest,
        context: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> HttpResponse:
        obj: AgentSession = kwargs["obj"]
        context |= {
            "owner_url": self._owner_url(request, obj),
            "tokens": self._token_rows(obj),
            "state": self.state_in_words(obj),
            "has_clear_permission": self.has_clear_permission(request, obj),
            "has_read_permission": self.has_read_permission(request, obj),
        }
        if context["has_read_permission"]:
            context["subtitle"] = obj.title or obj.session_id
            context |= self._transcript(request, obj)
        return super().render_change_form(request, context, *args, **kwargs)

    def item_view(
        self, request: HttpRequest, object_id: str, position: int
    ) -> HttpResponse:
        """Show one item as it is stored, as plain text."""
        obj = self.get_object(request, unquote(object_id))
        if not self.has_read_permission(request, obj):
            raise PermissionDenied
        if obj is None:
            raise Http404
        try:
            page = clearing.read_page(obj, before=position + 1, limit=1)
        except AgentSessionError as exc:
            raise Http404(str(exc)) from exc
        if not page.items or page.items[0].position != position:
            raise Http404
        return HttpResponse(
            clean_text(page.items[0].raw),
            content_type="text/plain; charset=utf-8",
            headers={
                "X-Content-Type-Options": "nosniff",
                "Content-Security-Policy": "sandbox",
            },
        )

    def _transcript(self, request: HttpRequest, obj: AgentSession) -> dict[str, Any]:
        before = _position(request.GET.get("before", ""))
        try:
            page = clearing.read_page(obj, before=before, limit=PAGE_LENGTH)
        except AgentSessionError as exc:
            return {"transcript_error": str(exc)}
        earlier = page.items[0].position if page.items and page.has_earlier else None
        return {
            "lines": join(page.items),
            "earlier_url": _with_before(request, earlier) if earlier else "",
            "newest_url": _with_before(request, None) if before is not None else "",
        }

    def _token_rows(self, obj: AgentSession) -> list[tuple[Any, str]]:
        fields = ("input", "output", "cached", "reasoning")
        return [
            (
                self.opts.get_field(f"{field}_tokens").verbose_name,  # type: ignore[union-attr]
                _grouped(getattr(obj, f"{field}_tokens")),
            )
            for field in fields
        ]

    def _owner_url(self, request: HttpRequest, obj: AgentSession) -> str:
        if obj.user_id is None:
            return ""
        user = get_user_model()._meta
        if not request.user.has_perm(f"{user.app_label}.view_{user.model_name}"):
            return ""
        name = f"{self.admin_site.name}:{user.app_label}_{user.model_name}_change"
        try:
            return reverse(name, args=(obj.user_id,))
        except NoReverseMatch:
            return ""


def _grouped(number: int) -> str:
    return number_format(number, use_l10n=True, force_grouping=True)


def _position(text: str) -> int | None:
    """Read the position in a link; anything else shows the newest page."""
    # A database's positions have 19 digits at most.
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def _with_before(request: HttpRequest, before: int | None) -> str:
    query = request.GET.copy()
    query.pop("before", None)
    if before is not None:
        query["before"] = str(before)
    return f"?{query.urlencode()}"
