"""Serves a bundle over HTTP: OpenAI's routes, an adapter for each request, API keys, fair scheduling, limits.
Needs the extra ``serve``.
"""
