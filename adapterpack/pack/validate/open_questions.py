"""Lists what the validation of a pack left unchecked, so that nothing unchecked looks as if it had passed."""

from __future__ import annotations

from collections.abc import Iterator

from ..pack import SIGNATURE
from .checks.context import Subject

NO_BASE = "base: none was named (--base)"
SHAPES_ONLY = "base: compared by its shapes only"
_CANARY = (
    "canary: it needs the model running; attach (torch), export, and validate --full of the bundle (ONNX "
    "Runtime) replay it"
)
_CLAIMS = ("training", "metrics", "license", "base_license")


def questions_about(s: Subject) -> Iterator[str]:
    """Yields one text per open question, each ``what: why, or how to check it``."""
    manifest = s.pack.manifest
    if s.base is None:
        yield NO_BASE
    elif manifest.base.content is None and manifest.base.files is None:
        yield SHAPES_ONLY
    elif manifest.tokenizer is None:
        yield "tokenizer: the pack does not say which one it was trained with"
    yield _CANARY if manifest.canary else "canary: the pack carries none"
    if (s.folder / SIGNATURE).exists():
        yield f"signature: not verified (adapterpack verify {s.folder} --key KEY)"
    if not s.full:
        yield "second reader: the reference reader of safetensors was not asked (--full)"
    if manifest.lineage and manifest.lineage.parents:
        yield "lineage: the parents are named by digest and were not fetched"
    if claims := [name for name in _CLAIMS if getattr(manifest, name)]:
        yield f"claims: {', '.join(name.replace('_', ' ') for name in claims)} cannot be checked"
