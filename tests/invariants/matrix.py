"""Lists all invariants that the built-in methods are held to, and writes the table of who promises which."""

from __future__ import annotations

from collections.abc import Iterable

from adapterpack import testing
from adapterpack.adapter_methods import Method
from adapterpack.testing import BLOCKS, DIVISIBLE, FEW, LAYERS, MODELS, Invariant, always, folds, provable

from . import (
    attention,
    decoders,
    graph,
    interaction_laws,
    layer_kind_laws,
    learning,
    model,
    packing,
    positions,
    prompts,
    training,
)
from .layer_fixtures import STANDS


def _alone(method: Method) -> bool:
    """Whether PEFT has the method, and its file means something without the base."""
    return method.peft is not None and "from_peft_with_base" not in method.peft.overrides


def _layered(method: Method) -> bool:
    """Whether it is proved on a layer that stands alone: what a torch model and a graph of one layer are made
    of.
    """
    return method.traits.layers[0] in STANDS


def _everywhere(method: Method) -> bool:
    """Whether it acts on whatever a layer is given: PEFT, which needs positions as an input, is compared with
    others on whole models.
    """
    return _layered(method) and not method.is_positional


def _prompt(method: Method) -> bool:
    return method.kind == "prompt"


def _attention(method: Method) -> bool:
    return method.kind == "attention"


def _decoded(method: Method) -> bool:
    """Whether a layer alone cannot carry it, and all that it trains is at its sites."""
    return not _layered(method) and method.storage.shared is None


PROVED = {invariant.name: invariant for invariant in testing.INVARIANTS}
"""What :func:`adapterpack.testing.prove` checks."""

INVARIANTS = (
    PROVED["identity_at_init"],
    PROVED["trained_adapter_changes_the_output"],
    PROVED["fold_equals_forward"],
    PROVED["fold_in_row_blocks"],
    PROVED["torch_equals_numpy"],
    PROVED["gradients_reach_every_parameter"],
    Invariant(learning.loss_falls, provable, "kind", FEW),
    PROVED["shapes_declared"],
    PROVED["inputs_unchanged"],
    Invariant(learning.dtype_kept, provable, "kind"),
    PROVED["additive_law"],
    PROVED["low_rank_law"],
    PROVED["rows_do_not_mix"],
    Invariant(
        interaction_laws.in_order,
        lambda method: folds(method) and not method.traits.exclusive,
        "exclusive",
    ),
    Invariant(model.only_the_adapter_trains, _layered, "layers"),
    Invariant(model.disabled_is_the_base, _layered, "layers"),
    Invariant(model.layer_agrees, _layered, "layers"),
    Invariant(model.checkpointed_gradients, _layered, "layers"),
    Invariant(model.compiled_gradients, _layered, "layers", (LAYERS[0], BLOCKS[0]), first=True),
    Invariant(
        layer_kind_laws.every_kind_agrees,
        lambda method: _layered(method) and len(method.traits.layers) > 1,
        "layers",
        LAYERS[:1],
    ),
    Invariant(training.trained_and_packed, always, "kind", LAYERS[:1] + BLOCKS[:1] + MODELS[:1]),
    Invariant(
        model.active_together,
        lambda method: _everywhere(method) and folds(method) and not method.traits.exclusive,
        "exclusive",
        FEW,
    ),
    Invariant(
        graph.onnx_agrees,
        lambda method: _layered(method) and method.traits.batchable,
        "batchable",
    ),
    Invariant(
        graph.folded_onnx_agrees,
        lambda method: _layered(method) and folds(method),
        "kind",
        FEW,
    ),
    PROVED["config_schema"],
    PROVED["pack_round_trip"],
    Invariant(packing.scale_recomputed, always, "kind", FEW),
    Invariant(packing.file_size, always, "kind", FEW),
    Invariant(
        packing.peft_round_trip,
        lambda method: _layered(method) and _alone(method),
        "peft",
        DIVISIBLE,
    ),
    Invariant(
        packing.peft_parity,
        lambda method: _everywhere(method) and _alone(method),
        "peft",
        DIVISIBLE,
    ),
    Invariant(
        positions.acts_at_its_positions,
        lambda method: method.is_positional,
        "positional",
        FEW[:1] + BLOCKS[:1],
    ),
    Invariant(
        positions.positions_on_a_cache,
        lambda method: method.is_positional,
        "positional",
        FEW[:1] + BLOCKS[:1],
    ),
    Invariant(
        attention.disabled_attention_is_the_base,
        _attention,
        "kind",
        BLOCKS[:1],
    ),
    Invariant(attention.attended_rows_never_mix, _attention, "kind", BLOCKS[:1]),
    Invariant(
        attention.attended_onnx_agrees,
        lambda method: _attention(method) and method.traits.batchable,
        "batchable",
        BLOCKS[:1],
    ),
    Invariant(
        decoders.only_the_adapter_trains_there,
        _decoded,
        "kind",
        BLOCKS[:1] + MODELS[:1],
    ),
    Invariant(decoders.decoder_gradients, _decoded, "kind", BLOCKS[:1] + MODELS[:1]),
    Invariant(
        decoders.compiled_decoder_gradients,
        _decoded,
        "kind",
        BLOCKS[:1] + MODELS[:1],
        first=True,
    ),
    Invariant(prompts.form_as_declared, _prompt, "kind"),
    Invariant(prompts.form_torch_equals_numpy, _prompt, "kind"),
    Invariant(prompts.form_gradients_reach_every_parameter, _prompt, "kind"),
    Invariant(prompts.form_loss_falls, _prompt, "kind"),
    Invariant(prompts.form_dtype_kept, _prompt, "kind"),
    Invariant(prompts.form_kept_by_packing, _prompt, "kind"),
    Invariant(
        prompts.form_kept_by_peft,
        lambda method: _prompt(method) and method.peft is not None,
        "peft",
    ),
    Invariant(prompts.disabled_prompt_is_the_base, _prompt, "kind"),
    Invariant(prompts.prompted_rows_never_mix, _prompt, "kind"),
)


def render(known: Iterable[Method]) -> str:
    """The matrix as a page of Markdown: which cells are promised and which trait leaves one out, the layers,
    the configs, the laws.
    """
    listed = sorted(known, key=lambda method: method.name)
    head = ["invariant", *(method.name for method in listed)]
    body = [
        [f"`{i.name}`", *("promised" if i.needs(method) else f"n/a ({i.trait})" for method in listed)]
        for i in INVARIANTS
    ]
    body.append(
        ["layers", *("{} from {}x{}".format(m.traits.layers[0], *m.traits.min_features) for m in listed)]
    )
    table = "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body])
    configs = "\n".join(f"- {method.name}: `{config}`" for method in listed for config in method.examples)
    meanings = "\n".join(
        f"- `{i.name}`: {' '.join((i.check.__doc__ or '').partition(chr(10) * 2)[0].split())}"
        for i in INVARIANTS
    )
    intro = (
        "A cell is promised, and then tested for every config, or not applicable by its trait. The suite "
        "tests the first config of a "
        "method on every layer, block or model below, and the others on two."
    )
    subjects = [
        part
        for name, each in (("Layers", LAYERS), ("Blocks", BLOCKS), ("Models", MODELS))
        for part in (f"## {name}", ", ".join(one.label for one in each))
    ]
    sections = [
        "# Methods and what they promise",
        f"{intro}\nMade by `python tests/matrix_page.py`.",
        table,
        *subjects,
        "## Configs",
        configs,
        "## Invariants",
        meanings,
    ]
    return "\n\n".join(sections) + "\n"
