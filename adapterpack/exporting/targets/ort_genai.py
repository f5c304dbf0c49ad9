"""onnxruntime-genai: adds ``genai_config.json`` next to the graph, and names slots as its adapter files do.

Its config: https://onnxruntime.ai/docs/genai/reference/config.html. Adapter files for it come from ``olive
convert-adapters``, which calls the factors ``MODULE.lora_A.weight`` [in, r] and ``MODULE.lora_B.weight`` [r,
out] with the scale in B, so adapter files of both tools are interchangeable.
"""

from __future__ import annotations

from pathlib import Path

from ...base import read_json
from ...bundle import GENAI_FILE, GRAPH, PAST, Bundle, Port, growing_axis
from ...errors import Unsupported
from ...graph_passes import default_slot_name
from ...io import Json, strict_json
from ...runtime import Tokenizer
from ...slots import PEFT_NAMES
from .base import TARGETS, Target

_TYPES = frozenset(
    {
        "chatglm",
        "ernie4_5",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gpt2",
        "granite",
        "internlm2",
        "llama",
        "mistral",
        "nemotron",
        "olmo",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
    }
)
"""Model types that onnxruntime-genai knows by name; it treats every other decoder as ``decoder``."""
_FED = ("input_ids", "attention_mask", "position_ids")
"""The inputs that onnxruntime-genai feeds, besides the cache."""
_SEARCH: Json = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
}


def _write(folder: Path, bundle: Bundle) -> None:
    (folder / GENAI_FILE).write_bytes(strict_json.canonical(genai_config(folder, bundle)))


def genai_config(folder: Path, bundle: Bundle) -> Json:
    """Returns the config for the bundle in ``folder``: cache sizes come from the graph, the other values from
    the model's own config.

    Raises:
        Unsupported: the graph has an input that the product does not feed.
    """
    config = read_json(folder / "config.json")
    generation = (
        read_json(folder / "generation_config.json") if (folder / "generation_config.json").is_file() else {}
    )
    cache = [port for port in bundle.io.inputs if port.name.startswith(PAST)]
    non_cache = [port.name for port in bundle.io.inputs if port not in cache]
    if unknown := [name for name in non_cache if name not in _FED]:
        raise Unsupported(
            "onnxruntime-genai does not feed an input of this graph",
            found=", ".join(unknown),
            expected=", ".join(_FED),
            remedy="leave --target out",
        )
    if states := [port.name for port in cache if growing_axis(port.name, port.shape) is None]:
        raise Unsupported(
            "onnxruntime-genai is not told of the recurrent states of this model's layers",
            found=states[0],
            remedy="leave --target out",
        )
    heads, head_size = _cache_sizes(cache)
    logits = next(port for port in bundle.io.outputs if port.name == "logits")
    tokenizer = Tokenizer(folder)
    ends = sorted(tokenizer.eos_ids)
    bos = generation.get("bos_token_id", config.get("bos_token_id"))
    length = config.get("max_position_embeddings") or config.get("n_positions") or 2048
    return {
        "model": {
            "type": config["model_type"] if config.get("model_type") in _TYPES else "decoder",
            "bos_token_id": 0 if bos is None else bos,
            "eos_token_id": ends if len(ends) > 1 else ends[0] if ends else tokenizer.pad_id,
            "pad_token_id": tokenizer.pad_id,
            "context_length": length,
            "vocab_size": logits.shape[-1],
            "decoder": {
                "filename": GRAPH,
                "session_options": {
                    "log_id": "onnxruntime-genai",
                    "log_severity_level": 3,
                    "provider_options": [],
                },
                "head_size": head_size,
                "hidden_size": config.get("hidden_size") or config.get("n_embd"),
                "num_attention_heads": config.get("num_attention_heads") or config.get("n_head"),
                "num_hidden_layers": len(cache) // 2,
                "num_key_value_heads": heads,
                "inputs": {
                    **{name: name for name in non_cache},
                    "past_key_names": f"{PAST}%d.key",
                    "past_value_names": f"{PAST}%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            **{name: generation.get(name, default) for name, default in _SEARCH.items()},
            "max_length": length,
            "num_beams": 1,
            "past_present_share_buffer": False,
        },
    }


def _cache_sizes(cache: list[Port]) -> tuple[object, object]:
    """Returns the number of heads and their width, which must be the same in every layer."""
    sizes = {(port.shape[1], port.shape[3]) for port in cache}
    if len(sizes) != 1:
        raise Unsupported(
            "onnxruntime-genai has one size of cache for all layers",
            found=sorted(map(str, sizes)),
            remedy="leave --target out",
        )
    ((heads, width),) = sizes
    return heads, width


ort_genai = TARGETS.register(
    Target(
        "ort-genai",
        "onnxruntime-genai: a folder for og.Model, adapter files for og.Adapters",
        frozenset({"inputs", "folded"}),
        "export with --mode inputs: onnxruntime-genai has one adapter for all rows of a batch",
        lambda task: task.name == "text-generation",
        slot_name=lambda path, field: default_slot_name(path, PEFT_NAMES.get(field, field)),
        groups=False,
        write=_write,
    )
)
