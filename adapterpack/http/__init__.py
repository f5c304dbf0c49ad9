"""What the servers of this package have in common: connections, bodies, refusals, TLS, files that change.
Needs the extra ``serve``.
"""
