"""Images, files, tool calls and their outputs in a transcript."""

from __future__ import annotations

from typing import Any

import pytest

from agent_sessions.transcript import IMAGES_LENGTH, PartKind, join, parse
from agent_sessions.transcript.parts import IMAGE_BYTES, PART_LENGTH
from tests.transcript.test_transcript import PIXEL, stored, texts


class TestMedia:
    def part(self, **part: Any) -> Any:
        (found,) = parse({"role": "user", "content": [part]}).parts
        return found

    @pytest.mark.parametrize("form", ["png", "jpeg", "gif", "webp"])
    def test_small_images_of_safe_formats_are_shown(self, form: str) -> None:
        url = f"data:image/{form};base64,aGVsbG8="
        part = self.part(type="input_image", image_url=url)
        assert (part.kind, part.src) == (PartKind.IMAGE, url)

    @pytest.mark.parametrize(
        "url",
        [
            "data:image/svg+xml;base64,PHN2Zz4=",
            "data:image/svg+xml,<svg onload=alert(1)>",
            "data:text/html;base64,PGI+",
            "data:image/png;base64,<script>",
            "data:image/png,raw",
            "data:image/png;base64," + "A" * (IMAGE_BYTES * 2),
        ],
    )
    def test_other_data_is_named_only(self, url: str) -> None:
        part = self.part(type="input_image", image_url=url)
        assert (part.kind, part.src, part.href) == (PartKind.IMAGE_LINK, "", "")
        assert len(part.text) <= 50

    def test_remote_images_are_links(self) -> None:
        part = self.part(type="input_image", image_url="https://example.org/x.png")
        assert (part.kind, part.src) == (PartKind.IMAGE_LINK, "")
        assert part.href == "https://example.org/x.png"

    def test_images_by_id(self) -> None:
        part = self.part(type="input_image", file_id="file-1")
        assert (part.label, part.href) == ("file-1", "")

    @pytest.mark.parametrize(
        "url",
        [
            "javascript:alert(1)",
            " https://a",
            "https://a b",
            "ftp://a",
            "//a",
            "data:x",
        ],
    )
    def test_other_addresses_are_no_links(self, url: str) -> None:
        part = self.part(type="input_file", file_url=url, filename="x")
        assert (part.kind, part.href, part.label) == (PartKind.FILE, "", "x")

    def test_files_and_sounds_by_their_size(self) -> None:
        part = self.part(type="input_file", file_data="data:a/b;base64,AAAA")
        assert (part.kind, part.size) == (PartKind.FILE, 3)
        part = self.part(
            type="input_audio", input_audio={"data": "AAAA", "format": "wav"}
        )
        assert (part.kind, part.label, part.size) == (PartKind.AUDIO, "wav", 3)

    def test_what_was_said_is_shown_with_its_sound(self) -> None:
        for kind in ("input_audio", "output_audio"):
            said = {"type": kind, "audio": "AAAA", "transcript": "Hello"}
            parts = parse({"role": "user", "content": [said]}).parts
            assert [(p.kind, p.text) for p in parts] == [
                (PartKind.AUDIO, ""),
                (PartKind.TEXT, "Hello"),
            ]
            assert parts[0].size == 3

    def test_safety_checks_of_a_computer_are_shown(self) -> None:
        check = {"id": "s", "code": "malicious", "message": "Look out"}
        item = {"type": "computer_call", "call_id": "c", "action": {"type": "click"}}
        (plain,) = parse({**item, "pending_safety_checks": []}).arguments
        assert "safety" not in plain.text
        (given,) = parse({**item, "pending_safety_checks": [check]}).arguments
        assert "Look out" in given.text
        output = {"type": "computer_call_output", "call_id": "c", "output": {}}
        parts = parse({**output, "acknowledged_safety_checks": [check]}).parts
        assert "Look out" in parts[-1].text

    def test_unknown_parts_are_json(self) -> None:
        part = self.part(type="hologram", depth=3)
        assert (part.kind, part.label) == (PartKind.CODE, "hologram")
        assert '"depth": 3' in part.text

    def test_a_page_carries_so_many_images(self) -> None:
        url = "data:image/png;base64," + "A" * 1_200_000
        message = {
            "role": "user",
            "content": [{"type": "input_image", "image_url": url}],
        }
        kinds = [line.entry.parts[0].kind for line in join(stored(*[message] * 5))]
        assert kinds == [PartKind.IMAGE] * 3 + [PartKind.IMAGE_LINK] * 2
        assert 3 * len(url) <= IMAGES_LENGTH


class TestTools:
    def test_arguments_that_are_json_are_set_in_lines(self) -> None:
        entry = parse(
            {
                "type": "function_call",
                "call_id": "c1",
                "name": "weather",
                "namespace": "tools",
                "status": "completed",
                "arguments": '{"city":"Köln"}',
            }
        )
        assert (entry.name, entry.server, entry.call_id) == ("weather", "tools", "c1")
        assert [part.text for part in entry.arguments] == ['{\n  "city": "Köln"\n}']

    @pytest.mark.parametrize("text", ["{broken", "plain", "[" * 5_000, "1" * 20_000])
    def test_other_arguments_stay_as_they_are(self, text: str) -> None:
        item = {"type": "function_call", "name": "f", "arguments": text}
        (part,) = parse(item).arguments
        assert part.text == text[:PART_LENGTH]

    def test_no_arguments_are_no_part(self) -> None:
        assert parse({"type": "function_call", "name": "f"}).arguments == ()

    def test_results_that_lie_in_the_call(self) -> None:
        assert texts(parse({"type": "mcp_call", "output": "ok"})) == ["ok"]
        failed = parse({"type": "mcp_call", "error": {"code": 1}})
        assert failed.parts[0].label == "error"
        code = parse(
            {
                "type": "code_interpreter_call",
                "outputs": [
                    {"type": "logs", "logs": "2"},
                    {"type": "image", "url": "https://example.org/a.png"},
                ],
            }
        )
        assert [part.kind for part in code.parts] == [
            PartKind.TEXT,
            PartKind.IMAGE_LINK,
        ]
        web = parse(
            {
                "type": "web_search_call",
                "action": {"sources": [{"type": "url", "url": "https://example.org"}]},
            }
        )
        assert web.parts[0].href == "https://example.org"
        found = parse(
            {
                "type": "file_search_call",
                "results": [{"filename": "a.txt", "text": "words"}],
            }
        )
        assert (found.parts[0].label, found.parts[0].text) == ("a.txt", "words")
        drawn = parse(
            {"type": "image_generation_call", "result": "aGk=", "output_format": "webp"}
        )
        assert drawn.parts[0].src == "data:image/webp;base64,aGk="
        svg = parse(
            {"type": "image_generation_call", "result": "aGk=", "output_format": "svg"}
        )
        assert svg.parts[0].kind is PartKind.IMAGE_LINK
        refused = parse({"type": "image_generation_call", "error": {"code": "x"}})
        assert refused.parts[0].label == "error"

    def test_outputs_of_parts(self) -> None:
        output = [
            {"type": "input_text", "text": "a"},
            {"type": "input_image", "image_url": PIXEL},
        ]
        entry = parse(
            {"type": "function_call_output", "call_id": "c", "output": output}
        )
        assert [part.kind for part in entry.parts] == [PartKind.TEXT, PartKind.IMAGE]

    @pytest.mark.parametrize(
        ("output", "text"), [(7, "7"), (["x"], "x"), ({"a": 1}, "{")]
    )
    def test_outputs_of_any_kind(self, output: Any, text: str) -> None:
        entry = parse(
            {"type": "function_call_output", "call_id": "c", "output": output}
        )
        assert entry.parts[0].text.startswith(text)

    def test_approvals(self) -> None:
        asked = parse({"type": "mcp_approval_request", "id": "m", "name": "rm"})
        yes = parse(
            {
                "type": "mcp_approval_response",
                "approval_request_id": "m",
                "approve": True,
            }
        )
        no = parse(
            {"type": "mcp_approval_response", "approve": "true", "reason": "Why?"}
        )
        assert [entry.status for entry in (asked, yes, no)] == [
            "asked",
            "approved",
            "refused",
        ]
        assert asked.call_id == yes.call_id == "m"
        assert texts(no) == ["Why?"]
