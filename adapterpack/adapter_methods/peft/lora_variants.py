"""Reads PEFT's variants of LoRA that are plain LoRA once they are trained.

- BD-LoRA (``use_bdlora``): A or B is block-diagonal, stored as its blocks one below the other; here it
  becomes the full matrix.
- QALoRA (``use_qalora``, arXiv 2309.14717): A reads means of groups of inputs, times the number of groups, at
  GPTQ layers.
- MonteCLoRA (``monteclora_config``) and VeLoRA (``velora_config``, arXiv 2405.17991) differ only in training;
  what they store for it is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...errors import Unsupported
from ..core.arrays import block_diagonal
from ..core.config import require_whole
from ..core.peft_form import WITH_BASE, PeftContent
from ..core.site import Arrays, Tensors

READ_AS_LORA = frozenset({"use_bdlora", "use_qalora", "monteclora_config", "velora_config"})
"""The keys of PEFT's config that this module handles."""
FOR_TRAINING_ALONE = (
    *(
        f"lora_monteclora_sampler.{name}"
        for name in ("std_prior", "expert_weights_prior", "gaussian_var_prior", "expert_weights")
    ),
    "lora_velora_embed",
)
"""The tensors that MonteCLoRA and VeLoRA store at a site besides the factors."""
_MOST_BLOCKS, _LARGEST_GROUP = 64, 1024
"""Limits on the number of BD-LoRA's blocks (shards of a server) and on the size of QALoRA's groups (groups of
a quantized weight).
"""
_FACTOR = 16
_FREE = 1 << 24
"""Limits on the expanded size of an untrusted file: so many numbers for each stored number, plus a fixed
allowance. One of the two factors is always stored in full.
"""


def as_lora(content: PeftContent) -> PeftContent:
    """Returns the content with plain LoRA factors.

    Raises:
        ValueError: the factors do not have the blocks or groups that the config declares.
    """
    blocks = content.written.get("use_bdlora")
    sites = content.sites
    if content.packed or not (blocks or content.written.get("use_qalora")):
        return content
    if content.written.get("use_qalora"):
        group = content.written.get("qalora_group_size", 16)
        require_whole("qalora_group_size", group, 1, _LARGEST_GROUP)
        _require_size(sites, "lora_A", group)
        return content._replace(
            sites={
                path: {**params, "lora_A": _ungroup(params["lora_A"], group)}
                if _sees_means(path, params, content)
                else params
                for path, params in sites.items()
            }
        )
    if not isinstance(blocks, Mapping):
        raise ValueError(f"use_bdlora must be a configuration, not {blocks!r:.80}")
    require_whole("nblocks", blocks.get("nblocks", 1), 1, _MOST_BLOCKS)
    for factor in ("lora_A", "lora_B"):
        _require_size(sites, factor, blocks.get("nblocks", 1))
    return content._replace(sites={path: _whole(path, params, blocks) for path, params in sites.items()})


def _require_size(sites: Mapping[str, Tensors], factor: str, times: int) -> None:
    """Raises ValueError if a factor that grows ``times`` as large at every site would be far larger than
    everything stored.
    """
    stored = sum(value.size for params in sites.values() for value in params.values())
    made = times * sum(params[factor].size for params in sites.values() if factor in params)
    if made > _FACTOR * stored + _FREE:
        raise ValueError(f"{factor} would be {made} numbers, of a file of {stored}")


def _sees_means(path: str, params: Tensors, content: PeftContent) -> bool:
    """Whether A reads means of inputs. PEFT does that only at GPTQ layers; the base's weight shows it by its
    number of inputs.
    """
    if "lora_A" not in params:
        return False
    if content.base is None:
        raise Unsupported(
            "PEFT groups the inputs of QALoRA at layers of GPTQ alone, and the file does not say which "
            "its layers were",
            where=path,
            expected="the base",
            found="use_qalora",
            remedy=WITH_BASE,
        )
    shape = content.base.shape(f"{path}.weight")
    return (
        shape is None
        or shape[0 if content.written.get("fan_in_fan_out") else -1] != params["lora_A"].shape[-1]
    )


def _ungroup(A: np.ndarray, group: int) -> np.ndarray:
    """Expands A from means of groups of ``group`` inputs to the inputs themselves: ``[r, groups]`` to ``[r,
    groups * group]``.
    """
    return np.repeat(A * A.dtype.type(A.shape[1] / group), group, axis=1)


def _whole(path: str, params: Tensors, blocks: Mapping[str, Any]) -> Arrays:
    """Returns the full factors of a site. PEFT applies a name of its config if it occurs anywhere in the
    module's own name.
    """
    leaf = path.rpartition(".")[2]
    whole = dict(params)
    for factor, key in (("lora_A", "target_modules_bd_a"), ("lora_B", "target_modules_bd_b")):
        names = blocks.get(key) or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{key} must be a list of names, not {names!r:.80}")
        if factor in params and any(name in leaf for name in names):
            whole[factor] = _diagonal(params[factor], blocks.get("nblocks", 1))
    return whole


def _diagonal(stacked: np.ndarray, count: int) -> np.ndarray:
    """Builds the block-diagonal matrix from blocks stored one below the other."""
    if stacked.ndim != 2 or len(stacked) % count:
        raise ValueError(f"a factor of shape {stacked.shape} is not {count} blocks one below the other")
    return block_diagonal(np.split(stacked, count))
