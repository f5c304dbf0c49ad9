"""Maps llama.cpp's tensor names to transformers' module paths, and its row order to the model's, for each
model family.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ...errors import Unsupported


class GGUFFamily(NamedTuple):
    """A model family: llama.cpp's name for it, whether llama.cpp reorders the rows of queries and keys, and
    whether it adds one to norms.
    """

    name: str
    reorders: bool = False
    norms_plus_one: bool = False


FAMILIES = {
    "llama": GGUFFamily("llama", True),
    "mistral": GGUFFamily("llama", True),
    "granite": GGUFFamily("granite", True),
    "smollm3": GGUFFamily("smollm3", True),
    "olmo": GGUFFamily("olmo", True),
    "olmo2": GGUFFamily("olmo2"),
    "qwen2": GGUFFamily("qwen2"),
    "qwen3": GGUFFamily("qwen3"),
    "gemma": GGUFFamily("gemma", norms_plus_one=True),
    "gemma2": GGUFFamily("gemma2", norms_plus_one=True),
    "gemma3_text": GGUFFamily("gemma3", norms_plus_one=True),
    "phi3": GGUFFamily("phi3"),
    "bert": GGUFFamily("bert"),
}
"""Maps ``model_type`` to its family, for models whose linear weights llama.cpp's converter copies row by row
or reorders as below.
"""

_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
_SPECIAL: Mapping[str, Mapping[str, str]] = {
    "phi3": {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    "olmo2": {
        "post_attention_norm": "post_attention_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BERT_LAYER = {
    "attn_q": "attention.self.query",
    "attn_k": "attention.self.key",
    "attn_v": "attention.self.value",
    "attn_output": "attention.output.dense",
    "attn_output_norm": "attention.output.LayerNorm",
    "ffn_up": "intermediate.dense",
    "ffn_down": "output.dense",
    "layer_output_norm": "output.LayerNorm",
}
_BERT_OUTER = {
    "token_embd": "embeddings.word_embeddings",
    "position_embd": "embeddings.position_embeddings",
    "token_types": "embeddings.token_type_embeddings",
    "token_embd_norm": "embeddings.LayerNorm",
}


def module_of(family: GGUFFamily, name: str) -> str | None:
    """Returns the path in transformers' model of llama.cpp's tensor ``name`` (without ``.weight``); None if
    it is unknown, or the tensor's values differ from the module's.

    Example:
        >>> module_of(FAMILIES["llama"], "blk.3.attn_q"), module_of(FAMILIES["bert"], "blk.0.ffn_up")
        ('model.layers.3.self_attn.q_proj', 'encoder.layer.0.intermediate.dense')
    """
    if family.norms_plus_one and name.endswith("norm"):
        return None
    first, number, rest = (*name.split("."), "", "")[:3]
    bert = family.name == "bert"
    if first != "blk":
        return (_BERT_OUTER if bert else _OUTER).get(name)
    module = _BERT_LAYER.get(rest) if bert else {**_LAYER, **_SPECIAL.get(family.name, {})}.get(rest)
    layers = "encoder.layer" if bert else "model.layers"
    return None if module is None or not number.isdecimal() else f"{layers}.{number}.{module}"


def rope_row_order(family: GGUFFamily, path: str, rows: int, heads: int, groups: int) -> np.ndarray | None:
    """Returns, for each row of one head in the file, its row in the model's head, if llama.cpp reorders the
    rows of module ``path``; else None.

    A head's rows ``[first half, second half]`` become pairs with one row of each.

    Raises:
        Unsupported: the number of rows is not that of complete heads.

    Example:
        >>> rope_row_order(FAMILIES["llama"], "model.layers.0.self_attn.k_proj", 12, 4, 2).tolist()
        [0, 3, 1, 4, 2, 5]
    """
    owner = path.rpartition(".")[2]
    if not family.reorders or owner not in ("q_proj", "k_proj"):
        return None
    count = heads if owner == "q_proj" else groups
    if rows % (2 * count):
        raise Unsupported(
            "the rows of a query or key are not whole heads",
            where=path,
            found=rows,
            expected=f"a multiple of {2 * count}",
        )
    return np.arange(rows // count).reshape(2, -1).T.reshape(-1)
