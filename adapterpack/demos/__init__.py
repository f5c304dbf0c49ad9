"""The whole line on a real model: ``adapterpack demo``."""

from .._stage import callable_package

callable_package(__name__)
