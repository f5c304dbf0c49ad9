"""Lets notebooks show results as pages."""

from importlib import import_module


def show(result: object) -> str:
    """Returns a result's page, which :mod:`adapterpack.report.notebook` writes."""
    # The layers that have results know nothing of pages.
    return str(import_module("adapterpack.report.notebook").frame(result))


class Shown:
    """A result that a notebook shows as its page."""

    def _repr_html_(self) -> str:
        return show(self)
