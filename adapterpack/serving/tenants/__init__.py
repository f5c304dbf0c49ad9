"""Tenants of a server: API keys, their quotas, and the limits of all requests."""
