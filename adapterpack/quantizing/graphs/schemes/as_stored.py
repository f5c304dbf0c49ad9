"""Stores the codes of a quantized base unchanged: an export of such a base rounds nothing again."""

from __future__ import annotations

import onnx_ir as ir

from ....base.codecs.stored_form import Table
from ....onnx_graph import BlockGrid, quant_type, split_blocks
from .. import GRAPH_SCHEMES, Codes, ConstantProduct, GraphScheme, Rewriting
from ..replace_products import replace_products


def _rewrite(rewriting: Rewriting) -> int:
    stored = rewriting.stored
    assert stored is not None

    def replacement(product: ConstantProduct) -> ir.Graph | None:
        form = stored.form_of(product.rows()) if len(product.weight.shape) == 2 else None
        if form is None:
            return None
        if isinstance(form, Table):
            kind = quant_type(form.levels)
            assert kind is not None
            return product.in_table(form.q, form.scale, form.block, kind)
        # GatherBlockQuantized needs explicit zero points
        symmetric = form.symmetric and not _looked_up(product.weight)
        codes = Codes(
            split_blocks(form.block, form.q),
            BlockGrid(form.scale, form.zero, symmetric),
            order=form.order,
            minimum=form.minimum,
        )
        return product.in_bits(codes, form.bits)

    return replace_products(rewriting, replacement)


def _looked_up(weight: ir.Value) -> bool:
    return any(use.node.op_type == "Gather" for use in weight.uses())


for _name, _summary in (
    ("as-stored", "the codes of a quantized base, as they are"),
    (
        "as-trained",
        "the codes of the base that the packs were trained on, made by the library that made them then",
    ),
):
    GRAPH_SCHEMES.register(
        GraphScheme(_name, _summary, _rewrite, takes=frozenset({"accuracy"}), tolerance=1e-4, of_base=True)
    )
