"""Shared parts of the package's HTTP servers: connections, bodies, errors, TLS, files that reload. Needs the
extra ``serve``.
"""
