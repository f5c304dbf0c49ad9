"""The training core: sites, injection, data, tasks, and the glue to ``transformers.Trainer``; needs torch."""

from .._stage import callable_package

callable_package(__name__)
