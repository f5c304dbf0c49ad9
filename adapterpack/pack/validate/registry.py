"""Lists all rules of the validator, and the checks in the order in which they run."""

from __future__ import annotations

from .checks import (
    Check,
    CheckRule,
    base,
    composition,
    finding,
    folder,
    lineage,
    peft_agreement,
    remote,
    sites,
    template,
    tensors,
    text,
    values,
)

_GROUPS = (
    finding,
    folder,
    remote,
    tensors,
    values,
    sites,
    peft_agreement,
    base,
    text,
    template,
    lineage,
    composition,
)

RULES: dict[str, CheckRule] = {
    rule.id: rule for group in _GROUPS for rule in vars(group).values() if isinstance(rule, CheckRule)
}
"""Every rule by its id. Ids are never reused: the wording of a rule may change, its subject does not."""

CHECKS: tuple[Check, ...] = (
    tensors.tensor_index, tensors.digests, remote.in_pack, tensors.quantized, values.finite, sites.roles,
    sites.bounded, sites.positions, sites.scales, composition.follows, peft_agreement.peft_face, text.texts,
    lineage.lineage, template.carried, base.base_model, base.tokenizer, base.tied,
    base.quantization_trained_on, values.fused, base.share, peft_agreement.second_reader,
)  # fmt: skip
"""In order. After a check that finds an error the others are skipped, because their results on altered bytes
would mean nothing.
"""

HEADER_CHECKS: tuple[Check, ...] = (
    tensors.tensor_index, remote.in_pack, sites.roles, sites.bounded, sites.positions, sites.scales,
    text.texts, lineage.lineage, template.carried, base.base_model, base.tokenizer, base.tied,
    base.quantization_trained_on, base.share,
)  # fmt: skip
"""The checks that need only a tensor's name, dtype and shape, for packs of which only the headers are
available.
"""
