"""What somebody may have meant who wrote a word that there isn't."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

# The alias that is meant where none is named, as in DATABASES and CACHES.
DEFAULT_ALIAS = "default"


def did_you_mean(words: Iterable[str], known: Iterable[str]) -> str:
    """Ask for the known words that misspelt ones come near to, or say nothing."""
    folded = {word.lower(): word for word in known}
    # A word that is known is spelt right: something else is wrong with it.
    wrong = [word for word in words if word not in folded.values()]
    near = [get_close_matches(word.lower(), folded, n=1) for word in wrong]
    found = list(dict.fromkeys(folded[match] for each in near for match in each))
    return f"Did you mean {' or '.join(map(repr, found))}? " if found else ""


def did_you_mean_alias(alias: str, known: Iterable[str]) -> str:
    """Ask for the alias that one comes near to, or which of the two is misspelt."""
    near = get_close_matches(alias, known := list(known), n=1)
    if near and alias == DEFAULT_ALIAS:
        # The one that no project names: where it is missed, the other is wrong.
        return f"If {near[0]!r} is a misspelt {alias!r}, rename it. "
    return did_you_mean([alias], known)
