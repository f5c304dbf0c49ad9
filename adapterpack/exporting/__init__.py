"""Base + packs -> bundle: frontends, site map, emitter, parity."""

from .._stage import callable_package

callable_package(__name__)
