"""Schemes that users ask for but in which no graph can be written, with the reasons."""

from __future__ import annotations

from .. import GRAPH_SCHEMES, GraphScheme

GRAPH_SCHEMES.register(
    GraphScheme(
        "int8-dynamic",
        "eight bits, activations rounded with one scale for all of them",
        refused="one scale for all activations ruins the answers of language models; w8a8 is as quick, "
        "and has a scale for each row of activations",
    )
)
GRAPH_SCHEMES.register(
    GraphScheme(
        "fp8",
        "eight-bit floats",
        refused=(
            "ONNX Runtime has no product on eight-bit floats for CPUs; int8 has the same size and errs less"
        ),
    )
)
