"""Builds the decoder's graph that the engine runs: one graph for prompts and for steps, on caches that are
written in place.

It is derived from the ordinary graph and reads the same weights. Five things differ:

- Each attention of a known build is ``GroupQueryAttention``, which writes new keys and values into the
  buffers that it reads. Rows start at the beginning of their buffers, without padding; ``seqlens_k`` and
  ``total_sequence_length`` give their lengths. In a graph that has this operator already (of
  onnxruntime-genai's builder), it counts them by these instead of the mask.
- What else reads caches, such as an indexer, gets the past of each row as the ordinary graph has it, and
  writes into the same buffers (:mod:`.past_rows`).
- Slots of a bank are inputs ``[rows, ...]`` instead of ``Gather(bank, adapter_ids)``: one set of values for
  each row, or one for all of them, which broadcasts; ranks are free, and a set of rank 0 costs next to
  nothing. Slots of a graph for one adapter a run get the same axis.
- The graph computes logits only at the positions ``logits_positions`` ``[batch, n]``.
- Nothing is multiplied by the mask, which zeroes padding before a convolution or a recurrence; a mask that
  something else reads hides the padding of these pasts.

States of fixed size stay inputs and outputs, which a pass reads and returns. A decoder with an encoder also
takes ``source_lengths`` instead of a mask, and ``position_ids`` where the ordinary graph counts positions by
its cache.

Operator:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ..adapter_methods import Tensors
from ..base import reaches_of, read_json
from ..bundle import (
    ADAPTER_IDS,
    ADDED,
    CACHE_LENGTHS,
    DECODER,
    LAST_POSITIONS,
    LOGITS_POSITIONS,
    LONGEST,
    PAST,
    PRESENT,
    Bundle,
    MappedSite,
    SiteMap,
    cache_scale,
    graph_file,
    growing_axis,
    layer_of,
    part_ranks,
    read_bundle,
    replaced_states,
)
from ..errors import Unsupported
from ..io import Config
from ..onnx_graph import (
    PRODUCTS,
    add_initializer,
    add_input,
    constant_input,
    inputs_of,
    named_node,
    only_reader,
    take_output,
)
from ..slots import extents, is_looked_up, split_slot
from ..tasks import MAIN
from .attention import added_to_scores, attention_inputs, scores_and_sinks
from .constants import PREFIX, NewNodes, constant
from .past_rows import PastRows, counts_rows
from .position_inputs import PositionInputs
from .rotation import rotate_in_attention
from .source_rows import read_sources

_MULTIPLE = 8
"""The operator requires the width of heads to be a multiple of this."""
_THROUGH = frozenset({"Reshape", "Expand", "Unsqueeze", "Transpose", "Mul", "Cast"})
"""Operators that may come between a cache and the product with it: the graph repeats heads, transposes keys
and scales them.
"""
_REPEATING = frozenset({"Reshape", "Expand", "Unsqueeze"})
"""Operators that repeat the sinks of an attention's heads for every token."""
_OF_MASK = frozenset({"Slice", "Unsqueeze", "Cast"})
"""Operators that may come between the mask and a product with it."""
_ELEMENTWISE = frozenset({"Add", "Mul", "Div", "Sub", "Tanh", "Cast", "Clip", "Squeeze", "Unsqueeze"})
"""Operators that may come between the last product and the logits."""
_SIDES = ("key", "value")
_SCALES = 12
"""The index of the scales of int8 caches among the inputs of GroupQueryAttention."""


class _Attention(NamedTuple):
    """One attention of the graph: its inputs, the node that computes ``output``, and its scoring; ``added``
    are masks and biases, ``kept`` says which scores nothing replaces, ``sinks`` ``[heads]`` are scores of no
    token. ``keys`` and ``values`` are those of the pass's tokens, or with ``expanded`` those of all tokens,
    which the graph computes from its caches.
    """

    queries: ir.Value
    keys: ir.Value
    values: ir.Value
    output: ir.Value
    layer: int
    heads: int
    scale: float
    softcap: float = 0.0
    added: Sequence[ir.Value] = ()
    kept: Sequence[ir.Value] = ()
    sinks: np.ndarray | None = None
    expanded: bool = False


def write_decoder(folder: Path, context: int | None) -> None:
    """Derives the engine's graph from the ordinary graph and writes it to the same folder of the bundle; both
    share the file of weights. No row of the engine has more than ``context`` tokens.

    Raises:
        Unsupported: an attention of the graph has an unknown form.
    """
    model = ir.load(folder / graph_file(MAIN))
    make_decoder(model, read_json(folder / "config.json"), read_bundle(folder), context)
    ir.save(model, folder / graph_file(DECODER))


def make_decoder(model: ir.Model, config: Config, bundle: Bundle, context: int | None) -> None:
    """Turns a decoder's graph into the engine's graph, in place; ``config`` is the model's config, and no row
    has more than ``context`` tokens.

    Requires: heads of a width that the operator accepts; tables that depend on positions alone, and biases
    that depend on these or on what the tokens say; that nothing else reads caches whose keys and values an
    attention expands, or without a mask any cache.
    Ensures: the inputs and outputs that the module's docstring names; every weight is the ordinary graph's.

    Raises:
        Unsupported: the graph is not as required.
    """
    graph = model.graph
    ids = next(value for value in graph.inputs if value.name in {"input_ids", "decoder_input_ids"})
    ids.name = "input_ids"
    states = replaced_states(inputs_of(graph))
    growing = (name for name in inputs_of(graph) if name.startswith(PAST) and name not in states)
    caches = {name: inputs_of(graph)[name] for name in growing}
    layers = sorted({layer_of(name) for name in caches})
    _join_values(model)
    # a layer may read the cache of an earlier one (Gemma 3n), which comes first
    attentions = sorted(_attentions(model), key=lambda attention: attention.layer)
    if not (layers or states):
        raise Unsupported("this graph keeps nothing between passes", remedy="leave --static-cache out")
    batch = ids.shape[0]
    lengths, total = (
        add_input(graph, CACHE_LENGTHS, [batch], ir.DataType.INT32),
        add_input(graph, LONGEST, [], ir.DataType.INT32),
    )
    reaches, cap = reaches_of(config, max([-1, *layers]) + 1), config.get("attn_logit_softcapping") or 0.0
    windows = sorted({reach.window for reach in reaches if reach.window})
    past = PastRows(model, ids, lengths, total)
    # the ordinary graph counts positions by the cache's length, which in a static cache is its capacity
    places = PositionInputs(model, ids, list(caches.values()), total, context)
    fused = _count_by_lengths(model, lengths, total)
    image = config.get("image_token_id", config.get("image_token_index"))
    image = image if "image_features" in inputs_of(graph) else None
    for attention in attentions:
        added, last, reach = attention.added, attention.output.producer(), reaches[attention.layer]
        # what tokens say about each other is computed as in the ordinary graph, mask and window with it
        told = places.read_tokens(added)
        bias = [past.by_row(added)] if told else places.bias(added, last)
        window = _window_of(attention, places, windows, reach.window)
        ahead = places.looking_ahead(added, image, reach.window, attention.queries, last)
        if ahead and bias:
            raise Unsupported(
                "tokens that see later ones have a bias on their scores, too",
                found=bias[0].name,
                remedy="leave --static-cache out",
            )
        if reach.chunk is not None:
            bias = places.within_chunks(reach.chunk, bias, attention.queries, last)
        _replace(
            model,
            attention._replace(softcap=attention.softcap or float(cap), added=ahead or bias),
            lengths,
            total,
            # -1 turns the operator's window off
            -1 if ahead or told else window or -1,
            writes=next(one for one in attentions if one.layer == attention.layer) is attention,
            causal=not ahead,
        )
    _take_ends_as_inputs(graph, batch)
    read_sources(model)
    RemoveUnusedNodesPass()(model)
    # after unused nodes are gone: tables of biases are indexed by distance, and were replaced above
    places.index_tables()
    _keep_positions(model, bundle, batch)
    if bundle.mode != "folded":
        _take_rows_as_inputs(model, bundle.sites)
    RemoveUnusedNodesPass()(model)
    if fused:
        _require_lengths_alone(graph)
    rotate_in_attention(model)
    RemoveUnusedNodesPass()(model)
    expanded = {f"{PAST}{one.layer}.{side}" for one in attentions for side in _SIDES if one.expanded}
    _keep_rows(past, ids, list(caches.values()), inputs_of(graph).get("attention_mask"), expanded)
    RemoveUnusedNodesPass()(model)
    for name in ("attention_mask", "position_ids", ADAPTER_IDS):
        value = inputs_of(graph).get(name)
        if value is not None and not value.uses():
            graph.inputs.remove(value)
    model.opset_imports["com.microsoft"] = 1


def make_int8(model: ir.Model, scales: Tensors) -> bool:
    """Makes the caches of the engine's graph int8, in place, with the scales ``[heads, width]`` of each
    cache; says whether there are any. Caches that more than GroupQueryAttention reads stay as they are.

    Requires: a graph of :func:`make_decoder`, and scales for each of its caches.
    Ensures: these caches are int8 inputs and outputs, and their scales constants.
    """
    nodes = [
        node
        for node in model.graph
        if node.op_type == "GroupQueryAttention"
        and not any(use.node.op_type == "GatherND" for cache in node.inputs[3:5] for use in cache.uses())
    ]
    for node in nodes:
        node.resize_inputs(_SCALES + 2)
        # the scales of keys and values follow each other, in the order of the caches
        for place, (cache, grown) in enumerate(zip(node.inputs[3:5], node.outputs[1:], strict=True), _SCALES):
            cache.type = grown.type = ir.TensorType(ir.DataType.INT8)
            tensor = ir.tensor(scales[cache.name][:, None], name=cache_scale(cache.name))
            node.replace_input_with(place, add_initializer(model.graph, tensor))
        for side in "kv":
            node.attributes[f"{side}_quant_type"] = ir.AttrString(f"{side}_quant_type", "PER_CHANNEL")
        node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", 8)
    return bool(nodes)


def _forget_lengths(model: ir.Model, prefix: str, ends: Sequence[ir.Value], news: Sequence[ir.Value]) -> None:
    """Lets the nodes between ``news`` and ``ends``, which computed keys and values from caches, compute those
    of a pass's tokens alone: their shapes count nothing cached. Nodes whose names begin with ``prefix``
    compute these; other readers of the lengths keep them.
    """
    nothing = constant(model, "nothing_before", np.array([0]))
    copies = dict[ir.Value, ir.Value]()

    def without_past(value: ir.Value) -> ir.Value:
        node = value.producer()
        if node is None or value in copies:
            return copies.get(value, value)
        if node.op_type == "Shape":
            of_past = node.inputs[0].name.startswith(PAST) and node.attributes.get_int("start", 0) == 2
            return nothing if of_past else value
        inputs = [one and without_past(one) for one in node.inputs]
        if inputs == list(node.inputs):
            return value
        copied = named_node(node.op_type, f"{prefix}{node.name}", *inputs, **node.attributes)
        model.graph.insert_after(node, copied)
        (copies[value],) = copied.outputs
        return copies[value]

    todo = [*ends]
    reached = {*news}
    while todo:
        value = todo.pop()
        node = value.producer()
        if value in reached or node is None or node.op_type == "Shape":
            continue
        reached.add(value)
        for place, operand in enumerate(node.inputs):
            if operand is not None and operand.dtype == ir.DataType.INT64:
                node.replace_input_with(place, without_past(operand))
            elif operand is not None:
                todo.append(operand)


def _keep_rows(
    past: PastRows,
    ids: ir.Value,
    caches: Sequence[ir.Value],
    mask: ir.Value | None,
    expanded: Collection[str],
) -> None:
    """Lets what is left of the ordinary graph read caches and the mask.

    Raises:
        Unsupported: it reads a cache whose keys and values an attention has replaced by its own, or a graph
            without a mask reads any, so that nothing hides padding.
    """
    for cache in caches if mask is not None else ():
        past.count(cache)
    wrong = sorted(
        cache.name for cache in caches if (mask is None or cache.name in expanded) and past.reads(cache)
    )
    if wrong:
        raise Unsupported(
            "more than its attention reads a cache of this graph",
            found=", ".join(wrong[:4]),
            remedy="leave --static-cache out",
        )
    if mask is not None and not any(map(past.reads, caches)):
        _forget_padding(mask, ids)
    for cache in caches:
        past.keep(cache)
    if mask is not None:
        past.hide(mask)
    past.insert()


def _forget_padding(mask: ir.Value, ids: ir.Value) -> None:
    """Takes products with the mask out of a graph whose rows have no padding, and reads the number of rows
    from their tokens.
    """
    masks = [mask]
    for value in masks:
        for node, place in list(value.uses()):
            if node.op_type in _OF_MASK:
                masks.append(node.outputs[0])
            elif node.op_type == "Mul":
                node.outputs[0].replace_all_uses_with(node.inputs[1 - place])
            elif value is mask and counts_rows(node):
                node.replace_input_with(place, ids)


def _take_ends_as_inputs(graph: ir.Graph, batch: ir.SymbolicDim | int) -> None:
    """Replaces the last position of each row, where the graph computes it, by an input: a pass over a piece
    of a row does not contain that position.

    Raises:
        Unsupported: the graph uses the last position of the longest row instead.
    """
    positions = inputs_of(graph).get("position_ids")
    ends = [node for node in graph if node.op_type == "ReduceMax" and node.inputs[0] is positions]
    for node in ends:
        axes = constant_input(node, 1)
        if (
            axes is None
            # axis 1 or -1 of [batch, tokens]: the maximum within a row
            or [int(axis) % 2 for axis in axes.reshape(-1)] != [1]
            or not node.attributes.get_int("keepdims", 1)
        ):
            raise Unsupported(
                "the numbers of a row depend on the longest row of its batch",
                where=node.name,
                expected="on each row's own",
                remedy="leave --static-cache out",
            )
    value = add_input(graph, LAST_POSITIONS, [batch, 1], ir.DataType.INT64) if ends else None
    for node in ends:
        node.outputs[0].replace_all_uses_with(value)


def _keep_positions(model: ir.Model, bundle: Bundle, batch: ir.SymbolicDim | int) -> None:
    """Makes the graph's last product compute only the requested positions: selects them before the product,
    or after it where an adapter acts on the product at some positions only.
    """
    graph = model.graph
    logits = next(value for value in graph.outputs if value.name == "logits")
    wanted = add_input(graph, LOGITS_POSITIONS, [batch, "kept"], ir.DataType.INT64)
    product = last_product(logits)
    full = logits
    if product is not None and not any(
        site.node == product.name and site.positional for site in bundle.sites.values()
    ):
        # selecting the hidden states first saves the product for all other positions
        hidden = product.inputs[0]
        full = (
            hidden if hidden is not None and hidden.shape is not None and len(hidden.shape) == 3 else logits
        )
    # listed before GatherND becomes a reader of the value itself
    users = [(use.node, use.idx) for use in full.uses()]
    axis = constant(model, "last_axis", np.array([-1], np.int64))
    places = named_node("Unsqueeze", f"{PREFIX}places", wanted, axis)
    kept = named_node("GatherND", f"{PREFIX}kept", full, places.outputs[0], batch_dims=1)
    graph.insert_after(full.producer(), [places, kept])
    result = kept.outputs[0]
    for node, index in users:
        node.replace_input_with(index, result)
    logits.shape = None if logits.shape is None else ir.Shape([batch, "kept", logits.shape[-1]])
    result.type = full.type
    result.shape = None if full.shape is None else ir.Shape([batch, "kept", full.shape[-1]])
    # the selected values take over the name of the output
    if full is logits:
        take_output(graph, logits, result, "/all")


def last_product(value: ir.Value) -> ir.Node | None:
    """Returns the product with a constant from which a value is computed through elementwise nodes alone: a
    cap, a factor, an adapter's sum.
    """
    node = value.producer()
    while node is not None and node.op_type in _ELEMENTWISE:
        node = next(
            (
                operand.producer()
                for operand in node.inputs
                if operand is not None and operand.producer() is not None
            ),
            None,
        )
    return node if node is not None and node.op_type in PRODUCTS else None


def _take_rows_as_inputs(model: ir.Model, sites: SiteMap) -> None:
    """Makes every slot an input that holds one set of values for each row of the batch, or one set for all
    rows.
    """
    graph = model.graph
    numbers = {path: number for number, path in enumerate(sites)}
    slots = {(path, field) for path, site in sites.items() for field in site.fields}
    for value in [value for value in graph.inputs if split_slot(value.name) in slots]:
        path, field = split_slot(value.name)
        site = sites[path]
        dtype = value.dtype
        shape = extents(field, site, f"{{}}_{numbers[path]}".format)
        # only a graph for one adapter a run turns a slot itself
        picks = "Transpose" if len(value.shape) == len(shape) else "Gather"
        # an input without a default: the engine feeds every slot at each step
        del graph.initializers[value.name]
        value.const_value = None
        value.name = f"{path}.{field}"
        value.shape = ir.Shape(["adapters" if is_looked_up(field, site) else "adapter_rows", *shape])
        value.type = ir.TensorType(dtype)
        for node, _ in value.uses():
            # the input now has the rows that this Gather would have picked, or the layout of a slot
            if node.op_type == picks and (picks == "Transpose" or node.inputs[1].name == ADAPTER_IDS):
                node.outputs[0].replace_all_uses_with(value)
                graph.remove(node, safe=True)
    nodes = {node.name: node for node in graph}
    for path, site in sites.items():
        parts = nodes.get(f"{ADDED}{path}/parts")
        # ONNX Runtime cannot split an axis of length 0 (rank 0) evenly
        if parts is not None and not _join_products(graph, site, nodes, parts):
            parts.attributes.pop("num_outputs")
            parts.resize_inputs(2)
            parts.replace_input_with(
                1, add_input(graph, part_ranks(path), [len(site.members)], ir.DataType.INT64)
            )
    # the new inputs and products were added without regard to the order of nodes
    graph.sort()


def _join_products(graph: ir.Graph, group: MappedSite, nodes: Mapping[str, ir.Node], parts: ir.Node) -> bool:
    """Joins the ``up`` products of siblings into one, whose matrix is block-diagonal, and adds it to their
    packed product, where the siblings' sums read that product directly. The extra zeros cost less than the
    operators that this saves.
    """
    split = nodes.get(f"{group.path}/Split")
    ups, sums = (
        [nodes[name] for member in group.members if (name := f"{ADDED}{member}/{leaf}") in nodes]
        for leaf in ("up/0", "sum")
    )
    if split is None or not len(ups) == len(sums) == len(group.members) or group.rank > 3:
        return False
    plain = [
        value for total in sums for value in split.outputs if value in total.inputs and len(value.uses()) == 1
    ]
    # a part of the packed product has another reader, which must not see the adapters' sum
    if len(plain) < len(sums):
        return False
    product, down = split.inputs[0], parts.inputs[0]
    width = sum(value.shape[-1] for value in split.outputs)
    up = add_input(
        graph,
        f"{group.path}.up",
        ["adapter_rows", f"parts_{group.path}", width],
        down.dtype or ups[0].inputs[1].dtype,
    )
    added = named_node("MatMul", f"{ADDED}{group.path}/up/0", down, up)
    total = named_node("Add", f"{ADDED}{group.path}/sum", product, added.outputs[0])
    total.outputs[0].shape, total.outputs[0].type = product.shape, product.type
    graph.insert_before(split, [added, total])
    split.replace_input_with(0, total.outputs[0])
    # each sibling's sum is now part of its share of the split
    for one, member_up, value in zip(sums, ups, plain, strict=True):
        one.outputs[0].replace_all_uses_with(value)
        graph.inputs.remove(member_up.inputs[1])
        graph.remove([one, member_up], safe=True)
    graph.remove(parts, safe=True)
    return True


def _count_by_lengths(model: ir.Model, lengths: ir.Value, total: ir.Value) -> bool:
    """Lets the attentions that are GroupQueryAttention already count by the engine's lengths; says whether
    there are any.
    """
    nodes = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    for node in nodes:
        for place, value in enumerate((lengths, total), 5):
            node.replace_input_with(place, value)
    return bool(nodes)


def _require_lengths_alone(graph: ir.Graph) -> None:
    """Checks that nothing but its attention counted the tokens of a graph by its mask.

    Raises:
        Unsupported: something else reads the mask, such as the choice of a table for long rows.
    """
    mask = inputs_of(graph).get("attention_mask")
    if mask is not None and not all(counts_rows(node) for node, _ in mask.uses()):
        raise Unsupported(
            "more than its attention reads the mask of this graph",
            found=", ".join(sorted({node.op_type for node, _ in mask.uses()})),
            remedy="leave --static-cache out",
        )


def _window_of(
    attention: _Attention, places: PositionInputs, windows: Sequence[int], stated: int | None
) -> int | None:
    """Returns the window of an attention, by its masks: they are right where a configuration states one that
    they do not have (Moshi), or counts layers without a cache, too (Dory).
    """
    for one in windows:
        if places.hides(attention.added, one, one == stated) or places.hides(attention.kept, one, False):
            return one
    return None


def _attentions(model: ir.Model) -> Iterator[_Attention]:
    """Yields every attention on a cache, in all known forms."""
    layers = {
        value.name: layer_of(value.name)
        for value in model.graph.outputs
        if value.name.startswith(PRESENT) and growing_axis(value.name, value.shape) is not None
    }
    for node in model.graph:
        if node.op_type == "Attention" and len(node.outputs) > 1 and node.outputs[1].name in layers:
            queries, keys, values = node.inputs[:3]
            inputs = attention_inputs(node)
            if inputs is not None:
                yield _Attention(
                    queries,
                    keys,
                    values,
                    node.outputs[0],
                    layers[node.outputs[1].name],
                    inputs.heads,
                    inputs.scale,
                    node.attributes.get_float("softcap", 0.0),
                    [value for value in node.inputs[3:4] if value is not None],
                )
        elif node.op_type == "Softmax":
            yield from _of_softmax(node, layers)


def _join_values(model: ir.Model) -> None:
    """Makes the products of one softmax with several values (halves of the heads in DiffLlama) one product
    with the values side by side, as one attention computes it.
    """
    for softmax in [node for node in model.graph if node.op_type == "Softmax"]:
        weights = softmax.outputs[0]
        products = [user for user, place in weights.uses() if user.op_type == "MatMul" and place == 0]
        shapes = [list(product.inputs[1].shape or [None]) for product in products]
        if len(products) < 2 or not all(isinstance(shape[-1], int) for shape in shapes):
            continue
        add = NewNodes(softmax.name)
        start = 0
        ended = set()
        joined = add("Concat", "values", *(product.inputs[1] for product in products), axis=-1)
        whole = add("MatMul", "product", weights, joined)
        wide = sum(shape[-1] for shape in shapes)
        for value, shape in ((joined, shapes[0]), (whole, products[0].outputs[0].shape)):
            value.shape = ir.Shape([*list(shape)[:-1], wide])
            value.type = products[0].outputs[0].type
        for number, (product, shape) in enumerate(zip(products, shapes, strict=True)):
            ends = [np.array([end]) for end in (start, start + shape[-1], -1)]
            cut = [constant(model, f"{softmax.name}/{number}/{place}", end) for place, end in enumerate(ends)]
            part = add("Slice", f"part_{number}", whole, *cut)
            old = _after_mask(product.outputs[0])
            part.shape, part.type = old.shape, old.type
            old.replace_all_uses_with(part)
            ended |= {product, old.producer()}
            start += shape[-1]
        model.graph.insert_after(softmax, add.nodes)
        model.graph.remove(ended, safe=True)
        model.graph.sort()


def _of_softmax(node: ir.Node, layers: Mapping[str, int]) -> Iterator[_Attention]:
    inputs = attention_inputs(node)
    (_, beside) = scores_and_sinks(node)
    weights = node.outputs[0]
    # the share of the sinks is cut off, and the heads of all rows may be one axis
    between = {"Reshape", "Cast"} if beside is None else {"Reshape", "Cast", "Slice"}
    while (reader := only_reader(weights)) is not None and reader.op_type in between:
        weights = reader.outputs[0]
    product = next((user for user, place in weights.uses() if user.op_type == "MatMul" and place == 0), None)
    if inputs is None or product is None:
        return
    output = _after_mask(_by_head(product.outputs[0]))
    if beside is None:
        output, beside = _after_gate(output, node.inputs[0])
    sinks = None if beside is None else _sinks(beside, inputs.heads)
    if (sinks is None) != (beside is None):
        return
    values, keys = (_cache_of(value, layers) for value in (product.inputs[1], inputs.keys))
    expanded = values is None or keys is None
    used: set[int | None]
    if values is not None and keys is not None:
        used = {layers[values.name], layers[keys.name]}
        keys, values = (cache.producer().inputs[1] for cache in (keys, values))
    else:
        used = {_layer_behind(value, layers) for value in (product.inputs[1], inputs.keys)}
        keys, values = (_apart(value, inputs.heads) for value in (inputs.keys, product.inputs[1]))
    (layer,) = used if len(used) == 1 else (None,)
    if layer is not None and keys is not None and values is not None:
        yield _Attention(
            inputs.queries,
            keys,
            values,
            output,
            layer,
            inputs.heads,
            inputs.scale,
            0.0,
            *added_to_scores(node),
            sinks=sinks,
            expanded=expanded,
        )


def _layer_behind(value: ir.Value, layers: Mapping[str, int]) -> int | None:
    """Returns the layer from whose cache alone a value is computed, or None."""
    todo = [value]
    reached = set()
    found = set()
    while todo:
        one = todo.pop()
        if one.name in layers:
            found.add(layers[one.name])
        elif one.name == "input_ids":
            return None
        elif one not in reached and (node := one.producer()) is not None and node.op_type != "Shape":
            todo += [operand for operand in node.inputs if operand is not None]
        reached.add(one)
    return found.pop() if len(found) == 1 else None


def _apart(value: ir.Value | None, heads: int) -> ir.Value | None:
    """Returns keys or values ``[batch, heads, tokens, width]`` before they are laid out for a product."""
    while value is not None:
        shape = list(value.shape or ())
        if len(shape) == 4 and shape[1] == heads and isinstance(shape[3], int):
            return value
        node = value.producer()
        value = node.inputs[0] if node is not None and node.op_type in _THROUGH else None
    return None


def _sinks(value: ir.Value | None, heads: int) -> np.ndarray | None:
    """Returns the number of each head that a value repeats for every token, or None."""
    while value is not None and value.const_value is None:
        node = value.producer()
        value = node.inputs[0] if node is not None and node.op_type in _REPEATING else None
    numbers = None if value is None or value.is_graph_input() else value.const_value.numpy().reshape(-1)
    return numbers if numbers is not None and numbers.size == heads else None


def _by_head(value: ir.Value) -> ir.Value:
    """Returns an attention's output ``[batch, heads, tokens, width]`` where it is computed as ``[batch *
    heads, tokens, width]``.
    """
    node = only_reader(value)
    joined = value.shape is not None and len(value.shape) == 3
    return node.outputs[0] if joined and node is not None and node.op_type == "Reshape" else value


def _after_mask(value: ir.Value) -> ir.Value:
    """Returns an attention's output after the Where that zeroes tokens which attend to nothing; the engine
    needs no such Where, since every token attends to itself.
    """
    node = only_reader(value)
    if node is not None and node.op_type == "Where" and node.inputs[2] is value:
        replacement = constant_input(node, 1)
        if replacement is not None and not replacement.any():
            return node.outputs[0]
    return value


def _after_gate(value: ir.Value, scores: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """Returns an attention's output after the gate that takes the share of sinks away, the sigmoid of the
    ``scores``' log-sum-exp less the sinks, and the sinks; without such a gate the output itself.
    """
    reader = only_reader(value)
    if reader is not None and reader.op_type == "Mul":
        gate: ir.Node | None = reader.inputs[reader.inputs[0] is value].producer()
        for op in ("Unsqueeze", "Sigmoid"):
            gate = gate.inputs[0].producer() if gate is not None and gate.op_type == op else None
        total = gate.inputs[0].producer() if gate is not None and gate.op_type == "Sub" else None
        if gate and total and total.op_type == "ReduceLogSumExp" and total.inputs[0] is scores:
            return reader.outputs[0], gate.inputs[1]
    return value, None


def _cache_of(value: ir.Value | None, layers: Mapping[str, int]) -> ir.Value | None:
    """Returns the cache from which a value derives, as the Concat with the past computes it; or None."""
    while value is not None and value.name not in layers:
        node = value.producer()
        value = node.inputs[0] if node is not None and node.op_type in _THROUGH else None
    node = None if value is None else value.producer()
    return value if node is not None and node.op_type == "Concat" and len(node.inputs) == 2 else None


def _replace(
    model: ir.Model,
    attention: _Attention,
    lengths: ir.Value,
    total: ir.Value,
    window: int,
    *,
    writes: bool,
    causal: bool,
) -> None:
    """Replaces an attention, and the cache that it outputs if it ``writes``, by GroupQueryAttention. One that
    reads the cache of another computes what that one writes once more, for itself alone.
    """
    graph, layer = model.graph, attention.layer
    add = NewNodes(f"{layer}" if writes else f"{layer}/{attention.output.name}")
    caches = [inputs_of(graph)[f"{PAST}{layer}.{side}"] for side in _SIDES]
    olds = [
        next(value for value in graph.outputs if value.name == f"{PRESENT}{layer}.{side}") for side in _SIDES
    ]
    key_heads, *widths = caches[0].shape[1], *(cache.shape[3] for cache in caches)
    if attention.expanded and writes:
        # the cache holds what the graph computed from it
        key_heads, *widths = attention.heads, *(side.shape[3] for side in attention[1:3])
        news = [old.producer().inputs[1] for old in olds]
        for side, old, new in zip(("keys", "values"), olds, news, strict=True):
            for node, place in old.uses():
                node.replace_input_with(place, new)
            if getattr(attention, side) is old:
                attention = attention._replace(**{side: new})
        _forget_lengths(model, add.prefix, attention[1:3], news)
    # zeros make keys and values as wide as the wider of them, and as a multiple that the operator takes
    width = -(-max(widths) // _MULTIPLE) * _MULTIPLE
    for cache in caches:
        cache.shape = ir.Shape([cache.shape[0], key_heads, cache.shape[2], width])
    flat = []
    for name, value, heads, own in (
        ("queries", attention.queries, attention.heads, widths[0]),
        ("keys", attention.keys, key_heads, widths[0]),
        ("values", attention.values, key_heads, widths[1]),
    ):
        flat.append(_by_token(model, layer, name, value, (heads, own, width), add))
    # the bias comes after three optional inputs for rotation, two tables and the positions, and before sinks
    sinks = None if attention.sinks is None else constant(model, f"{layer}/sinks", attention.sinks)
    rest = [None, None, None, *(attention.added or [None]), sinks]
    while rest and rest[-1] is None:
        rest.pop()
    node = ir.node(
        "GroupQueryAttention",
        [*flat, *caches, lengths, total, *rest],
        {
            "num_heads": attention.heads,
            "kv_num_heads": key_heads,
            "scale": attention.scale,
            "local_window_size": window,
            "do_rotary": 0,
            "softcap": attention.softcap,
            **({} if causal else {"causal": 0}),
        },
        domain="com.microsoft",
        name=f"{add.prefix}attention",
        num_outputs=3,
    )
    add.nodes.append(node)
    result = node.outputs[0]
    result.name = f"{node.name}:0"
    if len(attention.output.shape) == 4 or widths[1] != width:
        result = _as_read(model, add, result, attention, (widths[1], width))
    result.shape, result.type = attention.output.shape, attention.output.type
    graph.insert_before(attention.output.producer(), add.nodes)
    attention.output.replace_all_uses_with(result)
    for value, cache, old in zip(node.outputs[1:], caches, olds if writes else (), strict=writes):
        value.shape, value.type = cache.shape, cache.type
        # the operator's output takes the name of the cache that the Concat used to return
        take_output(graph, old, value, "/grown")


def _by_token(
    model: ir.Model, layer: int, name: str, value: ir.Value, sizes: tuple[int, int, int], add: NewNodes
) -> ir.Value:
    """Returns queries, keys or values as the operator takes them, ``[batch, tokens, heads * wide]``: with
    zeros after the numbers of each head. ``sizes`` are the heads, their width, and the operator's.
    """
    (heads, width, wide), by_head = sizes, value.shape is not None and len(value.shape) == 4
    if width == wide and not by_head:
        return value

    def numbers(what: str, *shape: int) -> ir.Value:
        return constant(model, f"{layer}/{name}/{what}", np.array(shape, np.int64))

    if by_head:
        apart = add("Transpose", f"{name}/by_token", value, perm=[0, 2, 1, 3])
    else:
        apart = add("Reshape", f"{name}/by_token", value, numbers("apart", 0, 0, heads, width))
    if width != wide:
        apart = add("Pad", f"{name}/wide", apart, numbers("ends", *[0] * 7, wide - width))
    return add("Reshape", name, apart, numbers("shape", 0, 0, heads * wide))


def _as_read(
    model: ir.Model, add: NewNodes, result: ir.Value, attention: _Attention, widths: tuple[int, int]
) -> ir.Value:
    """Returns the operator's result as the graph's nodes read it: by head, if the graph computes attention
    so, and without the zeros; ``widths`` are that of a head's values and the operator's.
    """
    (width, wide), by_head = widths, len(attention.output.shape) == 4

    def numbers(what: str, *shape: int) -> ir.Value:
        return constant(model, f"{attention.layer}/heads/{what}", np.array(shape, np.int64))

    result = add("Reshape", "heads", result, numbers("shape", 0, 0, attention.heads, wide))
    if width != wide:
        result = add(
            "Slice", "narrow", result, numbers("first", 0), numbers("last", width), numbers("axis", 3)
        )
    if by_head:
        return add("Transpose", "by_head", result, perm=[0, 2, 1, 3])
    return add("Reshape", "joined", result, numbers("joined", 0, 0, attention.heads * width))
