"""Lets notebooks show results as pages."""

from importlib import import_module


class Shown:
    """A result that a notebook shows as its page, which :mod:`adapterpack.report.notebook` writes."""

    def _repr_html_(self) -> str:
        # The layers that have results know nothing of pages.
        return str(import_module("adapterpack.report.notebook").frame(self))
