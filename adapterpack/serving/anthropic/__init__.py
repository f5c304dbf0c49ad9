"""Anthropic's Messages API over the same chat: its requests, and how its answers are written."""
