"""Smaller packs and bundles, with the error measured."""

from .._stage import callable_package

callable_package(__name__)
