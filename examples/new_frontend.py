"""A frontend of export in one file: what makes the ONNX graph of a checkpoint.

This one takes the graph that mobius or torch has written into the checkpoint's folder before. Export adds
slots for the packs, and compares the graph with the model in torch before anything is published. A package of
yours brings its frontend by an entry point: [project.entry-points."adapterpack.frontends"] ready =
"new_frontend:ready"; then `adapterpack export BASE PACK -o OUT`.
"""

import onnx_ir as ir

from adapterpack.exporting.frontends import FRONTENDS, BaseGraph, ExportSource, Frontend
from adapterpack.graph_passes.sites import onnxscript_scope

FILE = "ready.onnx"


def supports(source: ExportSource) -> bool:
    """Checkpoints with a graph in their folder."""
    return source.file is None and (source.folder / FILE).is_file()


def build(source: ExportSource) -> BaseGraph:
    """The graph, and how a node says which module it computes."""
    return BaseGraph(ir.load(source.folder / FILE), onnxscript_scope, "ready 1.0")


ready = FRONTENDS.register(Frontend("ready", supports, build, rank=0))
