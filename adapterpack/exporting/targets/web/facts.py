"""Collects the facts that a browser needs besides the manifest: the places of slots, the tokens that end an
answer, the maximum row length.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ....base.base_folder import read_json
from ....bundle.manifest import ADAPTER_IDS, PAST, Bundle
from ....errors import Unsupported
from ....pack.validate.validation import load
from ....runtime.text.context_length import context_length
from ....runtime.text.tokenizer import Tokenizer
from .data_files import SlotPlace

FACTS = "web.json"
_TOKENIZERS = frozenset({"BPE", "Unigram", "WordPiece"})
"""The tokenizer models that the package @huggingface/tokenizers supports."""
_TYPES = frozenset({"float32", "int64"})
_FED = frozenset({"input_ids", "attention_mask", "token_type_ids", "position_ids", ADAPTER_IDS})
"""The inputs that ``adapterpack.js`` feeds, besides the cache."""


def require_fed(folder: Path, bundle: Bundle) -> None:
    """Checks that a browser can feed the graph and start the rows of each adapter.

    Raises:
        Unsupported: the graph has another input or float type, the tokenizer is of another kind, or an
            adapter is a prompt.
    """
    if unknown := [
        port.name for port in bundle.io.inputs if port.name not in _FED and not port.name.startswith(PAST)
    ]:
        raise Unsupported(
            "a browser does not feed an input of this graph",
            found=", ".join(unknown),
            expected=", ".join(sorted(_FED)),
            remedy="leave out the adapter that acts at some positions only, or --target web",
        )
    if others := sorted({port.dtype for port in (*bundle.io.inputs, *bundle.io.outputs)} - _TYPES):
        raise Unsupported(
            "a browser reads and writes other numbers than this graph's",
            found=", ".join(others),
            expected=", ".join(sorted(_TYPES)),
            remedy="export with --dtype float32",
        )
    if (kind := type(Tokenizer(folder).core.model).__name__) not in _TOKENIZERS:
        raise Unsupported(
            "a browser has no tokenizer of this kind",
            where=folder / "tokenizer.json",
            found=kind,
            expected=", ".join(sorted(_TOKENIZERS)),
            remedy="leave --target web out",
        )
    for adapter in bundle.adapters:
        if load(folder / adapter.path).method.kind == "prompt":
            raise Unsupported(
                "a browser does not begin a row with an adapter's prompt",
                where=adapter.name,
                found="a prompt",
                remedy="leave this adapter out, or --target web",
            )


def facts(
    folder: Path, bundle: Bundle, slots: Mapping[str, SlotPlace], wasm_graph: str | None
) -> dict[str, Any]:
    """Returns the facts as plain JSON values; reads tokenizer, template and lengths the way the runtime
    does.
    """
    tokenizer = Tokenizer(folder)
    problems = {
        adapter.name: load(folder / adapter.path).manifest.problem
        for adapter in bundle.adapters
        if adapter.labels
    }
    return {
        "context": context_length(read_json(folder / "config.json"), folder / "config.json"),
        "ends": sorted(tokenizer.eos_ids),
        "pad": tokenizer.pad_id,
        "problems": problems,
        "slots": {
            name: {"file": place.file, "offset": place.offset, "shape": list(place.shape)}
            for name, place in slots.items()
        },
        "special": tokenizer.special_tokens,
        "template": tokenizer.template,
        "wasm_graph": wasm_graph,
    }
