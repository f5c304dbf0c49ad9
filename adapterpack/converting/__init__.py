"""Packs to and from the formats of other tools."""

from .._stage import callable_package

callable_package(__name__)
