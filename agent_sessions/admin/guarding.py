"""Pages whose errors are reported without what they show."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any

from django.contrib import admin
from django.http import HttpResponseBase
from django.template.response import SimpleTemplateResponse
from django.urls import URLPattern

from agent_sessions.reports import guarded

if TYPE_CHECKING:
    _ModelAdmin = admin.ModelAdmin[Any]
else:
    # Generic for type checkers alone.
    _ModelAdmin = admin.ModelAdmin


class GuardedAdmin(_ModelAdmin):
    """Guard every page of a ModelAdmin, Django's own too."""

    @property
    def urls(self) -> list[URLPattern]:
        urls = self.get_urls()
        for each in urls:
            each.callback = _guarded_view(each.callback)
        return urls


def _guarded_view(view: Any) -> Any:
    guarded_view = guarded(view)

    @wraps(view)
    def call(*args: Any, **kwargs: Any) -> HttpResponseBase:
        response: Any = guarded_view(*args, **kwargs)
        if isinstance(response, SimpleTemplateResponse):
            # Django renders it after the view has returned.
            response.render = guarded(response.render)  # type: ignore[method-assign]
        return response  # type: ignore[no-any-return]

    return call
