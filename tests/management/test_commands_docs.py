"""docs/commands.md, held against the commands."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from django.core.management import load_command_class

from agent_sessions.backends.options import parse_age
from agent_sessions.retention.erasure import Left, Receipt

PAGE = (Path(__file__).parents[2] / "docs" / "commands.md").read_text(encoding="utf-8")
SECTIONS = {
    "clear_agent_sessions": "Clearing",
    "list_agent_sessions": "Listing",
    "show_agent_session": "Showing",
    "export_agent_sessions": "Exporting",
    "erase_agent_user": "Erasing a person",
}
CHOOSING = "Which sessions"
# What Django gives every command.
_GIVEN = {
    "--help",
    "--version",
    "--verbosity",
    "--settings",
    "--pythonpath",
    "--traceback",
    "--no-color",
    "--force-color",
    "--skip-checks",
}


def section(title: str) -> str:
    found = re.search(rf"^## {title}$(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    assert found, f"no section {title!r}"
    return found[1]


def first_column(text: str) -> set[str]:
    cells = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    return {word for cell in cells for word in re.findall(r"--[\w-]+", cell)}


def parser(command: str) -> Any:
    return load_command_class("agent_sessions", command).create_parser(
        "manage.py", command
    )


@pytest.mark.parametrize("command", SECTIONS)
def test_every_option_is_told(command: str) -> None:
    options = {
        option
        for action in parser(command)._actions
        for option in action.option_strings
        if option.startswith("--") and option not in {*_GIVEN, "--no-input"}
    }
    told = first_column(section(SECTIONS[command]))
    if "--older-than" in options:
        told |= first_column(section(CHOOSING))
    assert told == options


def test_every_line_of_the_page_is_understood() -> None:
    lines = [
        shlex.split(line)
        for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)
        for line in block.splitlines()
    ]
    assert {line[2] for line in lines} == SECTIONS.keys()
    for _, _, command, *words in lines:
        parser(command).parse_args(words)


@pytest.mark.parametrize("command", SECTIONS)
def test_the_exit_codes_are_those_of_the_help(command: str) -> None:
    help_text = load_command_class("agent_sessions", command).help
    codes = set(re.findall(r"\b([0-9]) [a-z]", help_text.partition("Exit codes:")[2]))
    table = section(SECTIONS[command]).partition("| exit code |")[2]
    if command in {"list_agent_sessions", "show_agent_session"}:
        assert codes == {"0", "1"}
        return
    assert set(re.findall(r"^\| (\d) \|", table, re.MULTILINE)) == codes


def test_the_receipt_has_the_keys_of_the_code() -> None:
    (block,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    receipt = json.loads(block)
    made = Receipt("alice", "17", "", left=[Left("", "", "", "")]).as_json()
    assert receipt.keys() == made.keys()
    assert receipt["left"][0].keys() == made["left"][0].keys()


def test_the_ages_of_the_page_are_ages() -> None:
    for age in re.findall(r"`(\d[\dwdhms]+)`", PAGE):
        assert parse_age(age)
