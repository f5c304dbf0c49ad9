"""Prepares folders of graphs that Olive and onnxruntime-genai made for servers: derives the engine's graph
from theirs, and proves it with random adapters, a different one in each row.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from ..adapter_methods import LoRA, Site, method_of
from ..bundle import Bundle
from ..errors import AdapterpackError, Unsupported
from ..manifest import structs as m
from ..pack import Pack, build
from ..paths import StrPath
from ..runtime import bundle_folder
from ..tasks import NO_TASK
from .parity import with_decoder

_LORA = LoRA(r=1, alpha=1)
"""The adapters of the proof, for which every graph has room."""
_LOG = logging.getLogger(__name__)


def served_folder(folder: StrPath) -> Path:
    """Returns the folder itself, or for one of another tool that of its bundle with the engine's graph.

    Raises:
        Unsupported: it cannot be told what the graph takes, or the engine cannot run it.
    """

    def finish(bundle: Bundle, out: Path) -> Bundle:
        adapters = [_random(bundle, seed) for seed in (1, 2)] if bundle.sites else []
        try:
            return with_decoder(bundle, out, _LOG.info, adapters)
        except AdapterpackError as error:
            raise Unsupported(
                "the graph of another tool in this folder cannot be served",
                where=folder,
                found=error.placeless_sentence.rstrip("."),
                remedy="run it with adapterpack run, or make a bundle for servers from the checkpoint that "
                "the graph was made of: adapterpack export BASE ADAPTERS -o BUNDLE",
            ) from error

    return bundle_folder(folder, finish)


def _random(bundle: Bundle, seed: int) -> Pack:
    """Returns a LoRA with random factors at every site of a bundle."""
    rng = np.random.default_rng(seed)

    def factor(out: int, width: int) -> np.ndarray:
        return rng.normal(scale=max(out, width) ** -0.5, size=(out, width)).astype(np.float32)

    adapters = {
        Site(path, site.in_features, site.out_features): (
            _LORA,
            {"lora_A": factor(_LORA.r, site.in_features), "lora_B": factor(site.out_features, _LORA.r)},
        )
        for path, site in bundle.sites.items()
    }
    return build(f"random-{seed}", method_of(_LORA), adapters, task=m.PackTask(NO_TASK), base=m.Base())
