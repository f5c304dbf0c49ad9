"""Packs combined into one pack, exactly, in factor space; without torch."""

from .._stage import callable_package

callable_package(__name__)
