"""Addresses of the admin's pages, and the keys that stand in them."""

from __future__ import annotations

from typing import Any

from django.contrib.admin.exceptions import NotRegistered
from django.contrib.admin.utils import quote
from django.db.models import Model
from django.http import HttpRequest
from django.urls import reverse

# What every database can store as a key.
MAX_KEY = 2**63 - 1


def registered(model_admin: Any, model: type[Model]) -> Any:
    """Return the ModelAdmin that the same site has for a model, or None."""
    try:
        return model_admin.admin_site.get_model_admin(model)
    except NotRegistered:
        return None


def address(model_admin: Any, page: str, *args: Any) -> str:
    """Return the address of a page of a ModelAdmin."""
    opts = model_admin.opts
    name = f"{model_admin.admin_site.name}:{opts.app_label}_{opts.model_name}_{page}"
    return reverse(name, args=[quote(arg) for arg in args])


def link(
    model_admin: Any, request: HttpRequest, model: type[Model], row: Any = None
) -> str:
    """Return the address of a row's page on the same site, or of the model's list.

    It is "" for those who may not see it, and where the site leaves the model out.
    """
    other = registered(model_admin, model)
    if other is None or not other.has_view_permission(request, row):
        return ""
    if row is None:
        return address(other, "changelist")
    return address(other, "change", row.pk)


def as_key(text: str) -> int | None:
    """Read a key or position in an address; None if no database can hold it."""
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        return None
    number = int(text)
    return number if number <= MAX_KEY else None
