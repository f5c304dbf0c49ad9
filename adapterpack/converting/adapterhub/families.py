"""Lists where AdapterHub's library puts its adapters in each family of models, and which of adapterpack's
sites each place is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ...errors import Unsupported, printable


class Family(NamedTuple):
    """One layout of layers. ``blocks`` maps the suffixes of AdapterHub's places of bottlenecks to those of
    adapterpack's sites; the last one is the feed-forward's.

    ``norm_first``: a layer's output is the residual stream itself. ``entry``: the module whose input a
    parallel adapter reads (``source`` of adapterpack's bottleneck). ``linear`` maps the suffixes of linear
    layers to their names in AdapterHub's config. ``outer`` is the name of the model within the task model
    that the library always wraps around it.
    """

    blocks: Mapping[str, str]
    norm_first: bool
    entry: str
    linear: Mapping[str, str]
    outer: str

    def block(self, place: str) -> tuple[str, str, bool] | None:
        """Returns (path of the layer, suffix of adapterpack's site, whether it is the feed-forward's) of one
        of AdapterHub's places, or None.
        """
        for their, ours in self.blocks.items():
            layer = place.removesuffix(f".{their}")
            if layer != place and layer.rpartition(".")[2].isdecimal():
                return layer, ours, their == list(self.blocks)[-1]
        return None


_BERT = Family(
    {"attention.output": "attention.output.dense", "output": "output.dense"},
    False,
    "input",
    {
        "attention.self.query": "q",
        "attention.self.key": "k",
        "attention.self.value": "v",
        "intermediate.dense": "intermediate",
        "output.dense": "output",
    },
    "bert",
)
_LLAMA = Family(
    {"attention_adapters": "self_attn", "output_adapters": "mlp"},
    True,
    "post_attention_layernorm",
    {
        "self_attn.q_proj": "q",
        "self_attn.k_proj": "k",
        "self_attn.v_proj": "v",
        "mlp.down_proj": "intermediate",
        "mlp.up_proj": "output",
    },
    "model",
)
_GPT2 = Family(
    {"attention_adapters": "attn", "output_adapters": "mlp"},
    True,
    "ln_2",
    {"attn.c_attn": "qkv", "mlp.c_fc": "intermediate", "mlp.c_proj": "output"},
    "transformer",
)
_ROBERTA = _BERT._replace(outer="roberta")

FAMILIES: dict[str, Family] = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "electra": _BERT._replace(outer="electra"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "gpt2": _GPT2,
}
"""``model_type`` -> its layout, for the models that were compared with the library."""


def family_of(model_type: object, where: object) -> Family:
    """Returns the layout of a model type.

    Raises:
        Unsupported: the layout is not known.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise Unsupported(
            "where AdapterHub puts its adapters in this kind of model is not known here",
            where=where,
            expected=", ".join(sorted(FAMILIES)),
            found=printable(str(model_type)[:80]),
            remedy="merge it with the library that made it (LoRA alone can be merged), or keep it there",
        )
    return FAMILIES[model_type]
