"""Metrics of engines that run each row in one pass (encoders). It adds no routes."""

from __future__ import annotations

from ...runtime import EncoderEngine
from .. import APIS, Api, ApiKind
from ..observability import Figure
from ..tenants import ServerLimits


def open_api(engine: EncoderEngine, limits: ServerLimits) -> Api:
    """Makes the metrics that show how much of an engine's passes was padding."""
    spent = engine.padding
    return Api(
        (),
        (
            Figure("passes", "Passes of the engine.", lambda: spent.passes),
            Figure("passed_rows", "Rows of these passes.", lambda: spent.rows),
            Figure("passed_tokens", "Tokens of these rows.", lambda: spent.tokens),
            Figure("passed_padding", "Positions of padding in these passes.", lambda: spent.padding),
        ),
    )


APIS.register(ApiKind("passes", lambda engine: isinstance(engine, EncoderEngine), open_api))
