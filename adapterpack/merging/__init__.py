"""Adapters folded into checkpoints, by row blocks, without torch."""

from .._stage import callable_package

callable_package(__name__)
