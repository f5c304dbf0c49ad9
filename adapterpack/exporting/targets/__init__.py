"""Who serves a bundle: one small file a product."""

from .base import Target, own_name
from .ort import ort
from .ort_genai import ort_genai
from .triton import triton

TARGETS: dict[str, Target] = {target.name: target for target in (ort, ort_genai, triton)}

__all__ = ["TARGETS", "Target", "own_name"]
