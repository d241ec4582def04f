"""What the admin shows in the browser tests; run in the site's own process.

Prints a JSON object: the superuser's session cookie, and the addresses of pages.
"""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import django

HOSTILE = "\"'><script>document.title='hacked'</script><img src=x onerror=alert(1)>"
# A blue rectangle.
PIXEL = (
    "data:image/png;base64,"
    "iVBORw0KGgoAAAANSUhEUgAAAHgAAAAoCAIAAAC6iKlyAAAAUklEQVR42u3QQQ0AAAgEoEtiTiMa"
    "yxbOBxsJSPVwIApEi0a0aNEWRItGtGjRFkSLRrRo0YgWjWjRohEtGtGiRSNaNKJFi0a0aESLFo1o"
    "0Yj+ZwElX6P4S8/fZAAAAABJRU5ErkJggg=="
)


def conversation() -> list[dict[str, Any]]:
    """Return an item of each look that the transcript has."""
    from tests.transcript.test_transcript import KINDS

    shown = {"type": "input_image", "image_url": PIXEL}
    remote = {"type": "input_image", "image_url": "https://example.org/x.png"}
    cited = {
        "type": "output_text",
        "text": "It is on its way.",
        "annotations": [
            {"type": "url_citation", "url": "https://example.org", "title": "Tracking"}
        ],
    }
    special = {"function_call", "function_call_output", "message"}
    return [
        {"role": "developer", "content": "Be kind and brief. " * 20},
        {"role": "user", "content": "Where is my order?\nIt has the number 42."},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [{"type": "summary_text", "text": "They ask for an order."}],
            "encrypted_content": "c2VjcmV0",
        },
        {
            "type": "function_call",
            "call_id": "call_1",
            "name": "find_order",
            "arguments": '{"order": 42}',
        },
        {"type": "function_call_output", "call_id": "call_1", "output": "shipped"},
        {"role": "assistant", "content": [cited]},
        {"role": "user", "content": "أين طلبي؟ رقم الطلب 42"},
        {"role": "user", "content": [shown, remote]},
        {
            "type": "function_call",
            "call_id": "call_2",
            "name": "transfer_to_billing",
            "arguments": "{}",
        },
        {
            "type": "function_call_output",
            "call_id": "call_2",
            "output": '{"assistant": "Billing"}',
        },
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        *(
            {"type": name, **item}
            for name, (item, _kind) in KINDS.items()
            if name not in special
        ),
        {"__enc__": 1, "kid": "key-1", "payload": "gAAAAABn"},
        {"type": "telepathy", "to": ["you"]},
        {"role": "assistant", "content": "word " * 3_000},
        {"role": "user", "content": HOSTILE},
    ]


def main() -> None:
    """Make it all."""
    django.setup()
    from django.conf import settings
    from django.contrib.auth import get_user_model
    from django.core.management import call_command
    from django.test import Client
    from django.urls import reverse
    from django.utils import timezone

    from agent_sessions import DjangoSession
    from agent_sessions.models import AgentRun, AgentSession, SessionItem
    from tests.support.waiting import wait

    call_command("migrate", verbosity=0)
    users: Any = get_user_model().objects
    root = users.create_superuser("root", password="x")
    alice = users.create_user("alice")
    session = DjangoSession("order-42", user=alice).sync
    session.add_items(conversation())  # type: ignore[arg-type]
    session.create_branch_from_turn(3, "another try")
    session.switch_to_branch("main")
    row = AgentSession.objects.get()
    last = SessionItem.objects.filter(branch=row.branch).latest("position").position
    SessionItem.objects.filter(position=last - 3).update(data='{"broken": ')
    early = SessionItem.objects.filter(position__lte=6)
    early.update(created_at=timezone.now() - timedelta(hours=3))
    AgentSession.objects.update(input_tokens=12345, output_tokens=678)
    now = timezone.now()
    asked = {"toolName": "refund_order", "arguments": '{"order": 42, "euros": 12.5}'}
    for number in range(40):
        status = ("completed", "completed", "failed", "cancelled")[number % 4]
        AgentRun.objects.create(
            session=row,
            branch=row.branch,
            run_id=f"run-{number}",
            agent_name=("Triage", "Billing")[number % 2],
            model="gpt-x",
            status=status,
            error_code="model_error" if status == "failed" else "",
            started_at=now - timedelta(days=number / 2),
            finished_at=now - timedelta(days=number / 2) + timedelta(seconds=7),
            first_position=1 if number == 1 else None,
            last_position=6 if number == 1 else None,
            input_tokens=1000 * (number % 7),
            output_tokens=100 * (number % 5),
            usage={"input_tokens_details": [{"cached_tokens": 3}]},
        )
    waiting = wait(
        row,
        "run-waiting",
        agent_name="Billing",
        first_position=7,
        last_position=12,
        interrupts=[{"id": "call_9", "metadata": asked}],
    )
    DjangoSession("empty").sync.add_items([{"role": "user", "content": HOSTILE}])
    wait(AgentSession.objects.get(session_id="empty"))
    AgentSession.objects.bulk_create(
        AgentSession(session_id=f"chat-{n}", title=f"Conversation {n}", user=alice)
        for n in range(60)
    )
    long = DjangoSession("long").sync
    long.add_items([{"role": "user", "content": f"Message {n}"} for n in range(250)])
    client = Client()
    client.force_login(root)
    names = "admin:agent_sessions_agentsession_{}"
    found = AgentSession.objects.get(session_id="long")
    print(  # noqa: T201
        json.dumps(
            {
                "cookie": client.cookies[settings.SESSION_COOKIE_NAME].value,
                "pages": {
                    "list": reverse(names.format("changelist")),
                    "transcript": reverse(names.format("change"), args=(row.pk,)),
                    "long": reverse(names.format("change"), args=(found.pk,)),
                    "overview": reverse(names.format("overview")),
                    "clear": reverse(names.format("clear"), args=(row.pk,)),
                    "delete": reverse(names.format("delete"), args=(row.pk,)),
                    "history": reverse(names.format("history"), args=(row.pk,)),
                    "runs": reverse("admin:agent_sessions_agentrun_changelist"),
                    "run": reverse(
                        "admin:agent_sessions_agentrun_change", args=(waiting.pk,)
                    ),
                },
            }
        )
    )


if __name__ == "__main__":
    main()
