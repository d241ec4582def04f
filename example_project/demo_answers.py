"""What the demo model says: decided from the history alone, without the SDK."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ABOUT = """\
I'm the **demo model**: I run offline, need no key and know only a few tricks. Try:

- "What's the weather in Lisbon and Oslo?": I call a tool
- "Where is order 41?": another one
- "Refund order 42": I ask for your approval first
- "I have a question about my invoices": I hand over to a colleague
- "My name is Alice", and later "What's my name?": I read the history
- "Tell me a story": long enough to stop me, or to reload the page meanwhile
- "Show me some formatting": lists, code and a link

With `OPENAI_API_KEY` set, a real model answers here instead."""

FORMATTING = """\
Here is what an answer may hold: **bold**, *italic*, `inline code` and a \
[link](https://www.djangoproject.com/).

1. Numbered points
2. in their order

- and plain ones
- like these

```python
from agent_sessions import get_session

session = get_session("user_123", user=request.user)
result = await Runner.run(agent, "Hello", session=session)
```

That's all of it."""

STORY = """\
Once upon a time there was a server in a quiet room, and every evening people came \
to talk to it. They told it their names, their orders and their worries, and it \
answered each of them, word by word.

But whenever the power failed, the server forgot them all. "Who are you?" it asked \
in the morning, and the people sighed and began again from the start.

One day a gardener came by. "Why don't you keep a diary?" she asked. "Write down each \
sentence before you answer it, one under the other, and never tear out a page."

So the server kept a diary. That night a storm came, and the lights went out in the \
middle of a sentence. In the morning the server woke, opened the diary and read.

"Good morning, Alice," it said when the first visitor knocked. "You were asking about \
order number forty-one, and I was just about to tell you that it's on its way."

Alice laughed, and the gardener nodded, and from then on nobody in that town had to \
tell a story twice. And if the power has not failed again, they are talking still."""

MARK = r"[\w'.-]"
CALM = re.IGNORECASE


@dataclass(frozen=True)
class ToolCall:
    """A tool that the model wants called."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """One turn of the model: text, thoughts before it and calls after it."""

    text: str = ""
    thoughts: str = ""
    calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class Question:
    """The last thing that was asked, and all that the model knows about it."""

    text: str
    earlier: Sequence[str]
    outputs: Sequence[tuple[str, str]]
    """Names and outputs of the tools called since it was asked."""
    tools: Collection[str]
    handoffs: Collection[str]

    @classmethod
    def read(
        cls,
        items: str | Sequence[Mapping[str, Any]],
        tools: Collection[str] = (),
        handoffs: Collection[str] = (),
    ) -> Question:
        """Read it from the items that the SDK hands to a model."""
        if isinstance(items, str):
            return cls(_text(items), (), (), tools, handoffs)
        asked: list[str] = []
        names: dict[str, str] = {}
        outputs: list[tuple[str, str]] = []
        for item in items:
            if item.get("role") == "user":
                asked.append(_text(item.get("content")))
                outputs = []
            elif item.get("type") == "function_call":
                names[item["call_id"]] = item["name"]
            elif item.get("type") == "function_call_output":
                outputs.append((names.get(item["call_id"], ""), _text(item["output"])))
        return cls(asked[-1] if asked else "", asked[:-1], outputs, tools, handoffs)


def answer(question: Question) -> Answer:
    """Decide what the demo model does next."""
    handed_over = [n for n, _ in question.outputs if n.startswith("transfer_to_")]
    done = [(n, o) for n, o in question.outputs if n not in handed_over]
    if done:
        return Answer("\n\n".join(_told(name, output) for name, output in done))
    for pattern, act in INTENTS:
        if found := re.search(pattern, question.text, CALM):
            reply = act(question, found)
            if reply is not None:
                return reply
    if handed_over:
        return Answer("I'm here now. What can I do for you?")
    return Answer(ABOUT)


def _text(content: Any) -> str:
    if isinstance(content, str):
        # Keyboards of telephones write the apostrophe of the typographers.
        return content.replace("\u2019", "'")
    parts = content if isinstance(content, list) else []
    return " ".join(_text(part.get("text", "")) for part in parts)


# What was told, and what is asked about it


def _facts(question: Question) -> dict[str, str]:
    """Return everything of the shape "my X is Y" that was said, the last one winning."""
    pattern = (
        rf"\bmy ({MARK}+(?: {MARK}+){{0,3}}?) (?:is|are) "
        r"([^.!?,;\n]{1,80}?)(?= and my |[.!?,;\n]|$)"
    )
    facts: dict[str, str] = {}
    for said in (*question.earlier, question.text):
        for name, value in re.findall(pattern, said, CALM):
            facts[_thing(name)] = value.strip()
        for name in re.findall(rf"\bcall me ({MARK}+)", said, CALM):
            facts["name"] = name.rstrip(".")
    return facts


def _thing(name: str) -> str:
    return name.casefold().replace("favorite", "favourite")


def _fact_told(question: Question, found: re.Match[str]) -> Answer | None:
    before = _facts(
        Question("", question.earlier, (), question.tools, question.handoffs)
    )
    new = {k: v for k, v in _facts(question).items() if before.get(k) != v}
    if "name" in new:
        return Answer(f"Nice to meet you, {new['name']}! I'll remember that.")
    if not new:
        return Answer("Yes, I remember.")
    told = " and ".join(f"your {name} is {value}" for name, value in new.items())
    return Answer(f"Noted: {told}. Ask me about it later.")


def _fact_asked(question: Question, found: re.Match[str]) -> Answer | None:
    name = "name" if "who am i" in found[0].casefold() else _thing(found[1])
    value = _facts(question).get(name)
    if value is None:
        return Answer(f"You haven't told me your {name} in this conversation yet.")
    return Answer(f"Your {name} is **{value}**.")


def _first_asked(question: Question, found: re.Match[str]) -> Answer | None:
    if not question.earlier:
        return Answer("That was the first thing you asked me.")
    return Answer(f"The first thing you said was: “{question.earlier[0]}”")


def _last_asked(question: Question, found: re.Match[str]) -> Answer | None:
    if not question.earlier:
        return Answer("Nothing yet: this is your first message here.")
    return Answer(f"Before this you said: “{question.earlier[-1]}”")


def _counted(question: Question, found: re.Match[str]) -> Answer | None:
    count = len(question.earlier) + 1
    return Answer(f"This is message number {count} of yours in this conversation.")


# Tools and colleagues


def _hand_over(question: Question, to: str) -> Answer | None:
    name = next((name for name in question.handoffs if to in name), None)
    if name is None or any(done == name for done, _ in question.outputs):
        return None
    return Answer(calls=(ToolCall(name),))


def _weather(question: Question, found: re.Match[str]) -> Answer | None:
    if "get_weather" not in question.tools:
        return _hand_over(question, "support")
    asked = re.search(r"\b(?:in|for|at) ([^.!?\n]+)", question.text, CALM)
    named = re.split(r",| and | & ", asked[1]) if asked else ["Lisbon"]
    cities = [
        re.sub(r" (today|now|please|tomorrow)$", "", city.strip(), flags=CALM)
        for city in named
        if city.strip()
    ]
    calls = tuple(ToolCall("get_weather", {"city": city}) for city in cities[:4])
    return Answer("Let me look outside.", calls=calls)


def _order(question: Question, found: re.Match[str]) -> Answer | None:
    if "order_status" not in question.tools:
        return _hand_over(question, "support")
    numbers = [int(digits) for digits in re.findall(r"\d{1,9}", question.text)]
    if not numbers:
        return Answer("Which order? Give me its number, for example 41.")
    calls = tuple(ToolCall("order_status", {"order_id": n}) for n in numbers[:4])
    return Answer("I'll look that up.", calls=calls)


def _refund(question: Question, found: re.Match[str]) -> Answer | None:
    numbers = [int(digits) for digits in re.findall(r"\d{1,9}", question.text)]
    if not numbers:
        return Answer("Which order shall I refund? Give me its number, for example 42.")
    calls = tuple(ToolCall("refund_order", {"order_id": n}) for n in numbers[:4])
    return Answer("A refund needs your approval.", calls=calls)


def _invoices(question: Question, found: re.Match[str]) -> Answer | None:
    if "list_invoices" not in question.tools:
        return _hand_over(question, "billing")
    thanks = "Hello, billing here. I'll get your invoices."
    return Answer(thanks, calls=(ToolCall("list_invoices"),))


def _told(name: str, output: str) -> str:
    """Return in a sentence what a tool returned."""
    try:
        told = json.loads(output)
    except ValueError:
        # A refusal or an error of a tool is plain text.
        told = None
    match name, told:
        case "get_weather", {"city": city, "sky": sky, "celsius": celsius}:
            return f"In {city} it's {sky}, {celsius} °C."
        case "order_status", {"order": order, "status": status, "price": price}:
            return f"Order **{order}** ({price}) is {status}."
        case "refund_order", {"order": order, "refunded": amount}:
            return f"Done: I refunded **{amount}** for order {order}."
        case "refund_order", _:
            return f"I didn't refund anything. What I was told: “{output}”"
        case "list_invoices", list():
            lines = [
                f"- **{i['invoice']}**: {i['total']} for order {i['order']}"
                for i in told
            ]
            return "Your last invoices:\n\n" + "\n".join(lines)
    return f"`{name}` says: {output}"


def _fixed(text: str) -> Callable[[Question, re.Match[str]], Answer | None]:
    return lambda question, found: Answer(text)


def _story(question: Question, found: re.Match[str]) -> Answer | None:
    thoughts = "A story, then. It should be about remembering, and long enough to stop."
    return Answer(STORY, thoughts=thoughts)


INTENTS: tuple[tuple[str, Callable[[Question, re.Match[str]], Answer | None]], ...] = (
    (
        rf"\bwhat(?:'s|s| is| are) my ({MARK}+(?: {MARK}+){{0,3}}?) *(?:\?|$)|\bwho am i\b",
        _fact_asked,
    ),
    (
        r"\bfirst\b.*\b(ask|say|said|message|question|tell|told)\b|\b(ask|say|said|tell|told)\b.*\bfirst\b",
        _first_asked,
    ),
    (r"\bwhat did i (just )?(ask|say|tell)\b|\blast (question|message)\b", _last_asked),
    (r"\bhow many (messages|questions)\b", _counted),
    (r"\brefund|\bmoney back\b", _refund),
    (r"\binvoices?\b|\bbilling\b|\bpayments?\b", _invoices),
    (r"\bweather\b|\bforecast\b", _weather),
    (r"\border", _order),
    (r"\bmy .+ (is|are) |\bcall me ", _fact_told),
    (r"\bstory\b|\blong answer\b", _story),
    (r"\bformat|\bmarkdown\b|\bcode\b", _fixed(FORMATTING)),
    (
        r"^\s*(hi|hello|hey|good (morning|evening|day))\b",
        _fixed("Hello! Ask me what I can do."),
    ),
    (r"^\s*(thanks|thank you)\b", _fixed("You're welcome.")),
    (r"^\s*(bye|goodbye)\b", _fixed("Goodbye. I'll keep our conversation.")),
)
