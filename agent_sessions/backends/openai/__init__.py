"""Histories in OpenAI's Conversations service."""

from __future__ import annotations

from agent_sessions.backends.openai.backend import OpenAIConversationsBackend

__all__ = ["OpenAIConversationsBackend"]
