"""Selects the blocks of a model whose output an adapter changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from ...adapter_methods import Site, Traits
from ...errors import SiteNotFound, Unsupported, nearest
from .sites import BYPASSED
from .wrapper import base_modules, innermost


class BlockLayout(NamedTuple):
    """What the repeated layers of a family call the modules that give the output of attention and of the
    feed-forward.
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
    # Bloom, whose modules add the residual themselves, and Falcon
    BlockLayout("self_attention.dense", "mlp.dense_4h_to_h"),
    BlockLayout("layer.0.SelfAttention", "layer.1.DenseReluDense"),  # T5's encoder
    BlockLayout("layer.0.SelfAttention", "layer.2.DenseReluDense"),  # T5's decoder
)
"""A layer has the first of these layouts whose two modules it has, whatever the model is called."""

WORDS: dict[str, tuple[str, ...]] = {
    "all-layers": ("layer",),
    "all-attention": ("attention",),
    "all-ffn": ("ffn",),
    "all-blocks": ("attention", "ffn"),
}
"""What ``targets`` may say instead of names."""


def select_blocks(
    model: nn.Module, targets: str | tuple[str, ...], traits: Traits, exclude: tuple[str, ...] = ()
) -> list[Site]:
    """The blocks that ``targets`` names, in the model's order: one of :data:`WORDS`, or module paths or the
    ends of them.

    Raises:
        SiteNotFound: a name matches nothing, or the model's layers are of no known layout.
        Unsupported: the module is trained whole, or its output has no width that is known.
    """
    modules = dict(base_modules(model))
    paths = (
        _find_word(modules, targets)
        if isinstance(targets, str) and targets in WORDS
        else _find_names(modules, targets)
    )
    for path in paths:
        if any(path == name or path.startswith(f"{name}.") for name in exclude):
            raise Unsupported(
                "a module can be adapted or trained whole, not both",
                where=path,
                remedy="take it out of targets or out of modules_to_save",
            )
    return [block_at(model, path, modules[path]) for path in modules if path in paths]


def block_at(model: nn.Module, path: str, module: nn.Module) -> Site:
    """The site of a block: both its features are the width of what it gives, a linear layer's own or the
    model's hidden size.

    Raises:
        Unsupported: neither is known, or the module is never called.
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


def _find_names(modules: Mapping[str, Any], targets: str | tuple[str, ...]) -> set[str]:
    chosen = set()
    for name in (targets,) if isinstance(targets, str) else targets:
        matches = {path for path in modules if path and (path == name or path.endswith(f".{name}"))}
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
