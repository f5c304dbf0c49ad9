"""Lists all invariants, tells by traits which of them a method promises, and proves these."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from ..adapter_methods import Method
from . import (
    attention,
    decoders,
    fold_laws,
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
from .case import BLOCKS, DIVISIBLE, LAYERS, MODELS, PROOFS, SUBJECTS, Case, Layer, Model
from .layer_fixtures import STANDS


class Invariant(NamedTuple):
    """One column of the matrix: ``check`` raises AssertionError; ``needs`` says of a method whether it
    promises this, by ``trait``.

    What takes long is checked on some ``layers`` only (default: :data:`LAYERS`), or for the ``first`` config
    of a method alone.
    """

    name: str
    check: Callable[[Case], None]
    needs: Callable[[Method], bool]
    trait: str
    layers: tuple[Layer | Model, ...] | None = None
    first: bool = False

    def holds_for(self, case: Case) -> bool:
        """Whether the cell is to be checked for this case."""
        subjects = SUBJECTS[case.method.traits.layers[0]]
        # where none of them is a subject: all, of the others there are few
        few = set(self.layers or ()) & set(subjects)
        chosen = case.layer in few if few else case.layer not in DIVISIBLE
        return (
            chosen and (not self.first or case.config == case.method.examples[0]) and self.needs(case.method)
        )


def _always(method: Method) -> bool:
    return method.kind in PROOFS


def _alone(method: Method) -> bool:
    """Whether PEFT has the method, and its file means something without the base."""
    return method.peft is not None and method.peft.from_peft_with_base is None


def _layered(method: Method) -> bool:
    """Whether it is proved on a layer that stands alone: what a torch model and a graph of one layer are made
    of.
    """
    return method.traits.layers[0] in STANDS


def _everywhere(method: Method) -> bool:
    """Whether it acts on whatever a layer is given: PEFT, which needs positions as an input, is compared with
    others on whole models.
    """
    return _layered(method) and not method.traits.positional


def _folds(method: Method) -> bool:
    return _always(method) and PROOFS[method.kind].folds and not method.limits.unfoldable


FEW = (LAYERS[0], LAYERS[3], *BLOCKS[:2])
"""Wide with a bias, tall without, two blocks: enough for what does not depend on the shape."""


def _prompt(method: Method) -> bool:
    return method.kind == "prompt"


def _attention(method: Method) -> bool:
    return method.kind == "attention"


def _decoded(method: Method) -> bool:
    """Whether a layer alone cannot carry it, and all that it trains is at its sites."""
    return not _layered(method) and method.storage.shared is None


def _any(method: Method) -> bool:
    return True


INVARIANTS = (
    Invariant(
        "identity_at_init",
        fold_laws.identity_at_init,
        lambda method: method.traits.identity_at_init,
        "identity_at_init",
    ),
    Invariant(
        "trained_adapter_changes_the_output", fold_laws.trained_adapter_changes_the_output, _always, "kind"
    ),
    Invariant("fold_equals_forward", fold_laws.fold_equals_forward, _folds, "kind"),
    Invariant(
        "fold_in_row_blocks",
        fold_laws.fold_in_row_blocks,
        lambda method: method.traits.row_separable,
        "row_separable",
    ),
    Invariant("torch_equals_numpy", learning.torch_equals_numpy, _always, "kind"),
    Invariant("gradients_reach_every_parameter", learning.gradients_reach_every_parameter, _always, "kind"),
    Invariant("loss_falls", learning.loss_falls, _always, "kind", FEW),
    Invariant("shapes_declared", fold_laws.shapes_declared, _any, "kind"),
    Invariant("inputs_unchanged", fold_laws.inputs_unchanged, _always, "kind"),
    Invariant("dtype_kept", learning.dtype_kept, _always, "kind"),
    Invariant("additive_law", fold_laws.additive_law, lambda method: method.traits.additive, "additive"),
    Invariant("low_rank_law", fold_laws.low_rank_law, lambda method: method.traits.low_rank, "low_rank"),
    Invariant("rows_do_not_mix", interaction_laws.rows_do_not_mix, _always, "kind"),
    Invariant(
        "in_order",
        interaction_laws.in_order,
        lambda method: _folds(method) and not method.traits.exclusive,
        "exclusive",
    ),
    Invariant("only_the_adapter_trains", model.only_the_adapter_trains, _layered, "layers"),
    Invariant("disabled_is_the_base", model.disabled_is_the_base, _layered, "layers"),
    Invariant("layer_agrees", model.layer_agrees, _layered, "layers"),
    Invariant("checkpointed_gradients", model.checkpointed_gradients, _layered, "layers"),
    Invariant(
        "compiled_gradients", model.compiled_gradients, _layered, "layers", (LAYERS[0], BLOCKS[0]), first=True
    ),
    Invariant(
        "every_kind_agrees",
        layer_kind_laws.every_kind_agrees,
        lambda method: _layered(method) and len(method.traits.layers) > 1,
        "layers",
        LAYERS[:1],
    ),
    Invariant(
        "trained_and_packed", training.trained_and_packed, _any, "kind", LAYERS[:1] + BLOCKS[:1] + MODELS[:1]
    ),
    Invariant(
        "active_together",
        model.active_together,
        lambda method: _everywhere(method) and _folds(method) and not method.traits.exclusive,
        "exclusive",
        FEW,
    ),
    Invariant(
        "onnx_agrees",
        graph.onnx_agrees,
        lambda method: _layered(method) and method.traits.batchable,
        "batchable",
    ),
    Invariant(
        "folded_onnx_agrees",
        graph.folded_onnx_agrees,
        lambda method: _layered(method) and _folds(method),
        "kind",
        FEW,
    ),
    Invariant("config_schema", fold_laws.config_schema, _any, "kind"),
    Invariant("pack_round_trip", packing.pack_round_trip, _any, "kind", FEW),
    Invariant("scale_recomputed", packing.scale_recomputed, _any, "kind", FEW),
    Invariant("file_size", packing.file_size, _any, "kind", FEW),
    Invariant(
        "peft_round_trip",
        packing.peft_round_trip,
        lambda method: _layered(method) and _alone(method),
        "peft",
        DIVISIBLE,
    ),
    Invariant(
        "peft_parity",
        packing.peft_parity,
        lambda method: _everywhere(method) and _alone(method),
        "peft",
        DIVISIBLE,
    ),
    Invariant(
        "acts_at_its_positions",
        positions.acts_at_its_positions,
        lambda method: method.traits.positional,
        "positional",
        FEW[:1] + BLOCKS[:1],
    ),
    Invariant(
        "positions_on_a_cache",
        positions.positions_on_a_cache,
        lambda method: method.traits.positional,
        "positional",
        FEW[:1] + BLOCKS[:1],
    ),
    Invariant(
        "disabled_attention_is_the_base",
        attention.disabled_attention_is_the_base,
        _attention,
        "kind",
        BLOCKS[:1],
    ),
    Invariant("attended_rows_never_mix", attention.attended_rows_never_mix, _attention, "kind", BLOCKS[:1]),
    Invariant(
        "attended_onnx_agrees",
        attention.attended_onnx_agrees,
        lambda method: _attention(method) and method.traits.batchable,
        "batchable",
        BLOCKS[:1],
    ),
    Invariant(
        "only_the_adapter_trains_there",
        decoders.only_the_adapter_trains_there,
        _decoded,
        "kind",
        BLOCKS[:1] + MODELS[:1],
    ),
    Invariant("decoder_gradients", decoders.decoder_gradients, _decoded, "kind", BLOCKS[:1] + MODELS[:1]),
    Invariant(
        "compiled_decoder_gradients",
        decoders.compiled_decoder_gradients,
        _decoded,
        "kind",
        BLOCKS[:1] + MODELS[:1],
        first=True,
    ),
    Invariant("form_as_declared", prompts.form_as_declared, _prompt, "kind"),
    Invariant("form_torch_equals_numpy", prompts.form_torch_equals_numpy, _prompt, "kind"),
    Invariant(
        "form_gradients_reach_every_parameter", prompts.form_gradients_reach_every_parameter, _prompt, "kind"
    ),
    Invariant("form_loss_falls", prompts.form_loss_falls, _prompt, "kind"),
    Invariant("form_dtype_kept", prompts.form_dtype_kept, _prompt, "kind"),
    Invariant("form_kept_by_packing", prompts.form_kept_by_packing, _prompt, "kind"),
    Invariant(
        "form_kept_by_peft",
        prompts.form_kept_by_peft,
        lambda method: _prompt(method) and method.peft is not None,
        "peft",
    ),
    Invariant("disabled_prompt_is_the_base", prompts.disabled_prompt_is_the_base, _prompt, "kind"),
    Invariant("prompted_rows_never_mix", prompts.prompted_rows_never_mix, _prompt, "kind"),
)


def cases(method: Method) -> Iterator[Case]:
    """Every row of the matrix for one method: its example configs on every layer that is wide enough for it,
    or on every model.
    """
    rows, columns = method.traits.min_features
    every = SUBJECTS[method.traits.layers[0]]
    fitting = [
        one
        for one in every
        if not isinstance(one, Layer) or (one.out_features >= rows and one.in_features >= columns)
    ]
    return (Case(method, config, one) for config in method.examples for one in fitting)


def prove(method: Method) -> int:
    """Checks every invariant that a registered method promises, on every case; returns how many cells were
    checked.

    Raises:
        AssertionError: one does not hold; names the config, the layer and the invariant.
    """
    cells = [
        (case, invariant) for case in cases(method) for invariant in INVARIANTS if invariant.holds_for(case)
    ]
    for case, invariant in cells:
        try:
            invariant.check(case)
        except Exception as error:
            what = (
                f"{method.name}: {invariant.name} does not hold for {case.config} on {case.layer.label}: "
                f"{error}"
            )
            raise AssertionError(what) from error
    return len(cells)


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
        "method on every layer, block or model below, and the others on two; `prove` tests all."
    )
    subjects = [
        part
        for name, each in (("Layers", LAYERS), ("Blocks", BLOCKS), ("Models", MODELS))
        for part in (f"## {name}", ", ".join(one.label for one in each))
    ]
    sections = [
        "# Methods and what they promise",
        f"{intro}\nMade by `python -m adapterpack.testing`.",
        table,
        *subjects,
        "## Configs",
        configs,
        "## Invariants",
        meanings,
    ]
    return "\n\n".join(sections) + "\n"
