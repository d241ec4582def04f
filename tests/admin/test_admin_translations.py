"""Whether the package speaks English, German and Japanese, wholly and as of now.

Strings are found without gettext's programs, which not every machine has. After a
change of strings: `django-admin makemessages --all --no-location --no-wrap`, translate,
`django-admin compilemessages`, all in agent_sessions/, and commit .po and .mo.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from gettext import GNUTranslations
from pathlib import Path
from typing import Any

import pytest
from django.test import Client
from django.urls import reverse
from django.utils import translation
from django.utils.translation.template import templatize

from agent_sessions.admin.layout import how_long
from agent_sessions.models import AgentSession
from tests.support.admin_pages import LIST, make, page, staff, url
from tests.support.waiting import wait

PACKAGE = Path(__file__).parents[2] / "agent_sessions"
LANGUAGES = ("de", "en", "ja")
SINGLE = {"_", "gettext", "gettext_lazy", "gettext_noop"}
PLURAL = {"ngettext", "ngettext_lazy"}

Message = tuple[str, str]


@pytest.fixture(autouse=True)
def _own_language() -> Iterator[None]:
    """Leave no reader's language to the tests after: Django's client does."""
    yield
    translation.deactivate()


def messages() -> set[Message]:
    """Find what is to be translated: (message, plural or "")."""
    found: set[Message] = set()
    for path in PACKAGE.rglob("*.py"):
        found.update(_of_code(ast.parse(path.read_text())))
    for path in PACKAGE.rglob("*.html"):
        source = templatize(path.read_text(), origin=str(path))
        for call in re.finditer(r"\b(?:n?gettext|_)\(", source):
            found.update(_of_code(ast.parse(_whole(source[call.start() :]))))
    return found


def _whole(source: str) -> str:
    """Cut a call out of what follows it."""
    ends = (n + 1 for n, char in enumerate(source) if char == ")")
    for end in ends:
        try:
            ast.parse(source[:end])
        except SyntaxError:
            continue
        return source[:end]
    raise AssertionError(source[:80])


def _of_code(tree: ast.AST) -> Iterator[Message]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        if name not in SINGLE | PLURAL:
            continue
        texts = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
        wanted = 2 if name in PLURAL else 1
        assert len(texts) >= wanted, ast.unparse(node)
        yield (str(texts[0]), str(texts[1]) if name in PLURAL else "")


def source(language: str) -> dict[Message, list[str]]:
    """Read a .po file: the translations of each message."""
    path = PACKAGE / "locale" / language / "LC_MESSAGES" / "django.po"
    text = path.read_text(encoding="utf-8")
    assert "fuzzy" not in text
    assert "#~" not in text
    found: dict[Message, list[str]] = {}
    for block in text.split("\n\n"):
        fields: dict[str, str] = {}
        field = ""
        for line in block.splitlines():
            if match := re.match(r'(msg\w+(?:\[\d\])?) (".*")$', line):
                field = match[1]
                fields[field] = ast.literal_eval(match[2])
            elif line.startswith('"'):
                fields[field] += ast.literal_eval(line)
        if fields.get("msgid"):
            key = (fields["msgid"], fields.get("msgid_plural", ""))
            found[key] = [v for name, v in fields.items() if name[:6] == "msgstr"]
    return found


def compiled(language: str) -> dict[Any, str]:
    """Read a .mo file as it will be read; the header is left out."""
    path = PACKAGE / "locale" / language / "LC_MESSAGES" / "django.mo"
    with path.open("rb") as file:
        catalog: dict[Any, str] = GNUTranslations(file)._catalog  # type: ignore[attr-defined]
    return {key: value for key, value in catalog.items() if key}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_string_is_translated_and_no_other(language: str) -> None:
    wanted, found = messages(), source(language)
    assert sorted(wanted - found.keys()) == [], "missing in the .po file"
    assert sorted(found.keys() - wanted) == [], "not used any more"
    assert [key for key, texts in found.items() if not all(texts)] == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_is_compiled_is_what_is_written(language: str) -> None:
    expected: dict[Any, str] = {}
    for (message, plural), texts in source(language).items():
        if plural:
            expected.update({(message, n): text for n, text in enumerate(texts)})
        else:
            expected[message] = texts[0]
    assert compiled(language) == expected


@pytest.mark.parametrize("language", LANGUAGES)
def test_translations_have_the_same_places_to_fill_in(language: str) -> None:
    def places(text: str) -> list[str]:
        return sorted(re.findall(r"%\(\w+\)[sd]|%[sd]", text))

    for (message, plural), texts in source(language).items():
        for text in texts:
            assert places(text) == places(plural or message), message


@pytest.mark.parametrize("language", LANGUAGES)
def test_plurals_are_counted_as_django_counts_them(language: str) -> None:
    numbers = {len(texts) for (_, plural), texts in source(language).items() if plural}
    assert numbers == {1 if language == "ja" else 2}


@pytest.mark.django_db
@pytest.mark.one_database
class TestPages:
    @pytest.mark.parametrize(
        ("language", "words"),
        [
            ("en", ("Overview", "waiting for approval", "agent sessions", "Store")),
            (
                "de",
                ("Übersicht", "wartet auf Freigabe", "Agentensitzungen", "Speicher"),
            ),
            ("ja", ("概要", "承認待ち", "エージェントセッション", "保存先")),
        ],
    )
    def test_the_list(self, language: str, words: tuple[str, ...]) -> None:
        wait(make())
        html = listed(staff("view", "read"), language)
        for word in words:
            assert word in html

    @pytest.mark.parametrize("language", LANGUAGES)
    def test_contents_are_never_translated(self, language: str) -> None:
        row: AgentSession = make("chat", {"role": "user", "content": "Overview"})
        client = staff("view", "read")
        client.defaults["HTTP_ACCEPT_LANGUAGE"] = language
        assert ">Overview</p>" in page(client, url("change", row))


def listed(client: Client, language: str) -> str:
    client.defaults["HTTP_ACCEPT_LANGUAGE"] = language
    return page(client, reverse(LIST))


def test_times_are_told_in_the_readers_language() -> None:
    from datetime import UTC, datetime, timedelta

    start = datetime(2026, 1, 1, tzinfo=UTC)
    with translation.override("de"):
        assert how_long(start, start + timedelta(seconds=1.5)) == "1,5 s"
    with translation.override("ja"):
        assert how_long(start, start + timedelta(seconds=83)) == "1分23秒"
