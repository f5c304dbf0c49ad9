"""An adapter from two checkpoints, a fine-tuned one and its base; the reverse of a merge, without torch."""

from .._stage import callable_package

callable_package(__name__)
