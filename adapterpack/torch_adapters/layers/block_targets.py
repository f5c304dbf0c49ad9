"""Selects the blocks of a model (attention, feed-forward or layers) whose output an adapter changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from ...adapter_methods import Site, Traits
from ...errors import SiteNotFound, Unsupported, nearest
from .sites import BYPASSED
from .wrapper import Targets, as_list, base_modules, innermost, is_inside, is_named


class BlockLayout(NamedTuple):
    """The names, inside a layer of a model family, of the modules that output attention and the feed-forward
    network.
    """

    attention: str
    ffn: str


LAYOUTS = (
    # BERT, RoBERTa, ELECTRA: before the dropout, the residual and the norm
    BlockLayout("attention.output.dense", "output.dense"),
    BlockLayout("self_attn", "mlp"),  # Llama, Mistral, Qwen, Gemma, Phi
    BlockLayout("self_attn", "fc2"),  # OPT, BART
    BlockLayout("attn", "mlp"),  # GPT-2
    BlockLayout("attention", "ffn"),  # DistilBERT
    BlockLayout("attention", "mlp"),  # ViT, GPT-NeoX
    BlockLayout("attention", "feed_forward"),  # wav2vec 2.0, HuBERT
    # Bloom, whose modules add the residual themselves, and Falcon
    BlockLayout("self_attention.dense", "mlp.dense_4h_to_h"),
    BlockLayout("layer.0.SelfAttention", "layer.1.DenseReluDense"),  # T5's encoder
    BlockLayout("layer.0.SelfAttention", "layer.2.DenseReluDense"),  # T5's decoder
)
"""Known layouts, in order; a layer uses the first of which it has both modules, whatever the model is
called.
"""

WORDS: dict[str, tuple[str, ...]] = {
    "all-layers": ("layer",),
    "all-attention": ("attention",),
    "all-ffn": ("ffn",),
    "all-blocks": ("attention", "ffn"),
}
"""Words that ``targets`` accepts instead of module names, with the parts of each layer that they select."""


def select_blocks(
    model: nn.Module, targets: Targets, traits: Traits, exclude: tuple[str, ...] = ()
) -> list[Site]:
    """Returns the sites of the blocks that ``targets`` names, in the model's order.

    ``targets`` is one of :data:`WORDS`, or names: module paths or their ends.

    Raises:
        SiteNotFound: a name matches nothing, or the model's layers are of no known layout.
        Unsupported: the module is trained in full, or the width of its output is unknown.
    """
    modules = dict(base_modules(model))
    paths = (
        _find_word(modules, targets)
        if isinstance(targets, str) and targets in WORDS
        else _find_names(modules, targets)
    )
    for path in paths:
        if is_inside(path, exclude):
            raise Unsupported(
                "a module can be adapted or trained whole, not both",
                where=path,
                remedy="take it out of targets or out of modules_to_save",
            )
    return [block_at(model, path, modules[path]) for path in modules if path in paths]


def block_at(model: nn.Module, path: str, module: nn.Module) -> Site:
    """Returns the site of a block. Both its widths are that of the block's output: a linear layer's own, else
    the model's hidden size.

    Raises:
        Unsupported: both are unknown, or the module is never called.
    """
    inner = innermost(module)
    if isinstance(inner, BYPASSED) or next(inner.parameters(), None) is None:
        raise Unsupported(
            "this module cannot be adapted",
            where=path,
            found=type(inner).__name__,
            remedy="name other targets",
        )
    width = getattr(inner, "out_features", getattr(inner, "nf", None))
    if width is None:
        config: Any = getattr(model, "config", None)
        width = (
            getattr(config.get_text_config(), "hidden_size", None)
            if hasattr(config, "get_text_config")
            else None
        )
    if not isinstance(width, int):
        raise Unsupported(
            "the width of this block's output is not known",
            where=path,
            found=type(inner).__name__,
            expected="a linear layer, or a model whose config has a hidden_size",
            remedy="name other targets",
        )
    return Site(path, width, width, "block")


def _find_word(modules: Mapping[str, Any], word: str) -> set[str]:
    """Returns the paths of the blocks that a word in :data:`WORDS` selects."""
    chosen = set()
    for path in modules:
        layout = next((paths for paths in LAYOUTS if all(f"{path}.{end}" in modules for end in paths)), None)
        if path.rpartition(".")[2].isdigit() and layout is not None:
            places = {"layer": path, "attention": f"{path}.{layout.attention}", "ffn": f"{path}.{layout.ffn}"}
            chosen |= {places[place] for place in WORDS[word]}
    if not chosen:
        raise SiteNotFound(
            "the model has no layers of a known layout",
            found=repr(word),
            remedy="name the modules in targets",
            expected="; ".join(f"{layout.attention} and {layout.ffn}" for layout in LAYOUTS),
        )
    return chosen


def _find_names(modules: Mapping[str, Any], targets: Targets) -> set[str]:
    """Returns the paths of the modules that names select."""
    chosen = set()
    for name in as_list(targets):
        matches = {path for path in modules if path and is_named(path, [name])}
        if not matches:
            leaves = {path.rpartition(".")[2] for path in modules}
            raise SiteNotFound(
                "the model has no such block",
                found=repr(name),
                expected=f"a module, or one of {', '.join(WORDS)}",
                remedy=nearest(name, leaves),
            )
        chosen |= matches
    return chosen
