"""Reads from a configuration the row lengths beyond which a model computes differently: sliding windows,
chunked attention, rotary scaling and so on.

Proofs of exported graphs need rows on both sides of each threshold.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from ..io import Config

_Rule = Callable[[Config], int | None]


class Threshold(NamedTuple):
    """A length up to which all rows are computed alike, and longer ones differently, because of ``field``.

    ``ends`` means that no row may be longer, because the model's context ends there.
    """

    field: str
    length: int
    ends: bool = False


class Thresholds(NamedTuple):
    """The thresholds that a configuration implies, the shortest first, and fields that this module cannot
    judge.
    """

    known: tuple[Threshold, ...] = ()
    unjudged: tuple[str, ...] = ()


def thresholds_of(config: Config) -> Thresholds:
    """Returns the thresholds of a model's configuration and of nested ones that read tokens.

    Example:
        >>> found = thresholds_of({"text_config": {"sliding_window": 40}, "hash_window": 3})
        >>> found.known[0].field, found.known[0].length, found.unjudged
        ('text_config.sliding_window', 40, ('hash_window',))
    """
    known = []
    unjudged = []
    for prefix, part in _parts(config, ""):
        lengths = (*_of_fields(part), *_of_rotations(part))
        known += [Threshold(prefix + field, length, field in ENDS) for field, length in lengths]
        unjudged += [prefix + name for name in _list_open_fields(part)]
    known.sort(key=lambda threshold: threshold.length)
    return Thresholds(tuple(dict.fromkeys(known)), tuple(dict.fromkeys(unjudged)))


def _parts(config: Config, prefix: str) -> Iterator[tuple[str, Config]]:
    """Yields a configuration and nested ones that read tokens, each with its prefix."""
    yield prefix, config
    for name in _NESTED:
        if isinstance(inner := config.get(name), Mapping):
            yield from _parts(inner, f"{prefix}{name}.")


_NESTED = ("text_config", "decoder", "encoder", "language_config", "llm_config", "thinker_config")
"""The names of nested configurations for a part that reads tokens."""


def _number(config: Config, field: str) -> int | None:
    """Returns a positive integer field, or None."""
    value = config.get(field)
    return value if type(value) is int and value > 0 else None


def _kinds(config: Config) -> list[str] | None:
    """Returns the kinds of the layers, if the configuration lists them."""
    kinds = config.get("layer_types")
    return [str(kind)[:80] for kind in kinds] if isinstance(kinds, list) else None


def _plain(field: str, used: Callable[[Config], bool] = lambda config: True) -> _Rule:
    """Returns a rule whose threshold is the field itself, if ``used`` accepts the configuration."""
    return lambda config: _number(config, field) if used(config) else None


def _slides(config: Config) -> bool:
    """Whether any layer has a sliding window."""
    kinds = _kinds(config)
    any_slides = kinds is None or any("sliding" in kind or "compressed" in kind for kind in kinds)
    return any_slides and config.get("use_sliding_window") is not False


def _chunks(config: Config) -> bool:
    """Whether any layer has chunked attention."""
    kinds = _kinds(config)
    return kinds is None or "chunked_attention" in kinds


def _both_sides(config: Config) -> int | None:
    """Returns the threshold of a window that extends to both sides."""
    width = _number(config, "local_attention")
    return None if width is None else width // 2 + 1


def _longformer(config: Config) -> int | None:
    """Returns the threshold of Longformer's windows, one per layer."""
    given = config.get("attention_window")
    widths = given if isinstance(given, list) else [given]
    return min((width // 2 + 1 for width in widths if type(width) is int and width > 1), default=None)


def _sparse_blocks(config: Config) -> int | None:
    """Returns the length at which BigBird's attention becomes sparse."""
    size = _number(config, "block_size")
    random = _number(config, "num_random_blocks")
    if size is None or random is None or config.get("attention_type") != "block_sparse":
        return None
    return (5 + 2 * random) * size


def _temperature(config: Config) -> int | None:
    """Returns the length from which Llama 4 scales attention by position."""
    scale = _number(config, "floor_scale")
    return scale - 1 if scale is not None and config.get("attn_temperature_tuning") else None


_DELTA_CHUNK = 64
"""The default of transformers' functions; no configuration names it."""
ENDS = ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len")
"""The names of the length of the context."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""The names of the number of experts: with fewer tokens than experts, some have nothing to do."""
_SCANS = ("chunk_size", "mamba_chunk_size")
"""Tokens that a scan sums at a time: longer rows give the same result computed in another way."""
_RULES: Mapping[str, _Rule] = {
    "sliding_window": _plain("sliding_window", _slides),
    "sliding_window_size": _plain("sliding_window_size"),
    "attention_window_size": _plain("attention_window_size"),
    "attention_chunk_size": _plain("attention_chunk_size", _chunks),
    "window_size": _plain(
        "window_size",
        lambda config: "local" in str([config.get("attention_types"), config.get("attention_layers")]),
    ),
    "local_attention": _both_sides,
    "attention_window": _longformer,
    "block_size": _sparse_blocks,
    "index_topk": _plain("index_topk"),
    "keep_window_size": _plain("keep_window_size"),
    "relative_attention_max_distance": _plain("relative_attention_max_distance"),
    "position_buckets": _plain("position_buckets"),
    "floor_scale": _temperature,
    # how many tokens transformers' code takes at a time in layers of the delta rule
    "linear_key_head_dim": lambda config: (
        _DELTA_CHUNK if "linear_attention" in (_kinds(config) or ()) else None
    ),
    **{field: _plain(field) for field in (*_SCANS, *_EXPERTS, *ENDS)},
}
"""Maps a field to the longest row that it has no influence on, if it influences longer ones."""


def _of_fields(config: Config) -> Iterator[tuple[str, int]]:
    """Yields the fields that are thresholds, with their lengths."""
    for field, rule in _RULES.items():
        if field in config and (length := rule(config)):
            yield field, length


def _of_rotations(config: Config) -> Iterator[tuple[str, int]]:
    """Yields the thresholds beyond which rotary frequencies, or the scale of queries, depend on the
    position.
    """
    for name, rope in _rotations(config):
        depends = _kind(rope) in _BY_LENGTH or rope.get("llama_4_scaling_beta")
        if depends and (original := _original(config, rope)):
            yield f"{name}.{_ORIGINAL}", original


def _original(config: Config, rope: Config) -> int | None:
    """Returns the length that the model was first trained for; looks in the same order as transformers."""
    return _number(config, _ORIGINAL) or _number(rope, _ORIGINAL) or _number(config, ENDS[0])


def longrope_length(config: Config) -> int | None:
    """Returns the most positions of a row that LongRoPE treats as short, or None without LongRoPE.

    A longer row has other frequencies from its first token on.

    Example:
        >>> rope = {"type": "su", "long_factor": [2.0]}
        >>> longrope_length({"rope_scaling": rope, "original_max_position_embeddings": 4096})
        4096
    """
    found = (
        (part, rope)
        for _, part in _parts(config, "")
        for _, rope in _rotations(part)
        if "long_factor" in rope
    )
    return next((_original(part, rope) for part, rope in found), None)


def turns_by_length(config: Config) -> bool:
    """Whether the rotary positions of a row depend on its length.

    Example:
        >>> turns_by_length({"rope_scaling": {"rope_type": "longrope"}})
        True
    """
    return any(_kind(rope) in _BY_LENGTH for _, part in _parts(config, "") for _, rope in _rotations(part))


def _rotations(config: Config) -> Iterator[tuple[str, Config]]:
    """Yields the parameters of rotary positions; each kind of layers may have its own."""
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(given := config.get(name), Mapping):
            inner = [(f"{name}.{key}", value) for key, value in given.items() if isinstance(value, Mapping)]
            yield from inner or [(name, given)]


def _kind(rope: Config) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")[:80]


_ORIGINAL = "original_max_position_embeddings"
_BY_LENGTH = frozenset({"longrope", "su", "dynamic"})
"""Kinds of rotary positions whose frequencies depend on the length of a row."""
_FIXED = frozenset({"default", "linear", "yarn", "llama3", "proportional", "axial"})
"""Kinds whose frequencies are the same for every row."""


def _list_open_fields(config: Config) -> Iterator[str]:
    """Yields fields that may depend on the length in an unknown way."""
    for field, value in config.items():
        unknown = field not in _RULES and field not in _NO_LENGTH and _SUSPECT.search(field)
        if unknown and type(value) is int and value > 1:
            yield field
    for kind in _kinds(config) or ():
        if kind not in _KNOWN_KINDS:
            yield f"layer_types: {kind}"
    for name, rope in _rotations(config):
        if _kind(rope) not in _BY_LENGTH | _FIXED:
            yield f"{name}: {_kind(rope)}"


_SUSPECT = re.compile(r"window|chunk|(local|lsh|global)_.*(len|stride|blocks)|radius|segment_means|topk_b")
_NO_LENGTH = frozenset(
    {"chunk_size_feed_forward", "max_window_layers", "sliding_window_pattern", "_sliding_window_pattern"}
)
"""Fields with suspicious names that have nothing to do with row lengths."""
_KNOWN_KINDS = frozenset(
    {
        "full_attention",
        "sliding_attention",
        "chunked_attention",
        "indexed_attention",
        "linear_attention",
        "attention",
        "mamba",
        "conv",
        "recurrent",
        "moe",
        "mlp",
        "hybrid",
        "hybrid_sliding",
        "dense",
        "sparse",
    }
)
"""Kinds of layers that depend on the length only by the fields above, or not at all."""


class Reach(NamedTuple):
    """How far a layer's tokens look back: over ``window`` tokens, including themselves, or to the start of
    their ``chunk``.
    """

    window: int | None = None
    chunk: int | None = None


def reaches_of(config: Config, layers: int) -> list[Reach]:
    """Returns how far back each of a decoder's layers looks.

    Example:
        >>> reaches_of({"sliding_window": 40, "layer_types": ["full_attention", "sliding_attention"]}, 2)
        [Reach(window=None, chunk=None), Reach(window=40, chunk=None)]
    """
    part = next(
        (part for _, part in _parts(config, "") if any(field in part for field in _LOOKING_BACK)), config
    )
    *windows, chunk = (_RULES[field](part) for field in _LOOKING_BACK)
    window = next(filter(None, windows), None)
    return [_reach(kind, window, chunk) for kind in _kinds_by_layer(part, layers)]


def said_in(config: Config, resolved: Config) -> dict[str, Any]:
    """Returns a configuration with the fields about windows and layer types that it leaves to the defaults of
    its transformers class, filled in from ``resolved``.

    Example:
        >>> said_in({"sliding_window": 8}, {"sliding_window": 9, "layer_types": ["full_attention"]})
        {'sliding_window': 8, 'layer_types': ['full_attention']}
    """
    left = {
        field: resolved[field]
        for field in (*_LOOKING_BACK, "layer_types", "use_sliding_window")
        if resolved.get(field) is not None and field not in config
    }
    inner = {
        name: said_in(part, resolved[name])
        for name in _NESTED
        if isinstance(part := config.get(name), Mapping) and isinstance(resolved.get(name), Mapping)
    }
    return {**config, **left, **inner}


_LOOKING_BACK = (
    "sliding_window",
    "sliding_window_size",
    "attention_window_size",
    "window_size",
    "attention_chunk_size",
)


def _reach(kind: str, window: int | None, chunk: int | None) -> Reach:
    """Returns how far back a layer of a kind looks."""
    if not kind:
        return Reach(window, None if window else chunk)
    if "chunk" in kind:
        return Reach(chunk=chunk)
    return Reach(window) if "sliding" in kind or "local" in kind else Reach()


def _kinds_by_layer(config: Config, layers: int) -> list[str]:
    """Returns the kind of each layer; empty strings if all layers are alike."""
    kinds = _kinds(config) or config.get("attention_layers")
    if isinstance(kinds, list) and len(kinds) >= layers:
        return [str(kind) for kind in kinds[:layers]]
    if every := _number(config, "sliding_window_pattern") or _number(config, "_sliding_window_pattern"):
        return ["sliding" if (number + 1) % every else "full" for number in range(layers)]
    if config.get("use_sliding_window") is True:
        first = _number(config, "max_window_layers") or 0
        return ["sliding" if number >= first else "full" for number in range(layers)]
    return [""] * layers


class LongRows(NamedTuple):
    """Row lengths on both sides of a model's thresholds.

    ``whole`` are lengths for the model itself; ``few`` are lengths that would take it too long, for a copy of
    its first ``kept`` layers. ``left_out`` maps a field to the reason why no row exceeds its threshold.
    """

    whole: tuple[int, ...] = ()
    few: tuple[int, ...] = ()
    kept: int = 0
    left_out: Mapping[str, str] = MappingProxyType({})


SHORT = LongRows()
"""The rows of a proof that needs no long ones."""


def rows_past(config: Config, weights: int, layers: int, kept: int, context: int | None) -> LongRows:
    """Returns the row lengths to prove a model with that has ``weights`` parameters in ``layers`` layers, of
    which a copy has ``kept``; none is longer than ``context``.

    Example:
        >>> rows_past({"sliding_window": 40}, 10_000, 2, 2, 256).whole
        (40, 56)
    """
    whole = set()
    few = set()
    left_out = {}
    for threshold in thresholds_of(config).known:
        longest = threshold.length + (0 if threshold.ends else max(_BEYOND, threshold.length // 4))
        longest = longest if context is None else min(longest, context)
        if not threshold.ends and longest <= threshold.length:
            # The context ends before any row could exceed the threshold.
            continue
        lengths = {longest} if threshold.ends else {threshold.length, longest}
        if weights * longest <= (_MOST_AT_THE_END if threshold.ends else _MOST_WHOLE):
            whole |= lengths
        elif not threshold.ends and kept < layers and weights * kept // layers * longest <= _MOST_FEW:
            few |= lengths
        else:
            left_out[threshold.field] = f"rows of {longest} tokens take this model too long"
    return LongRows(tuple(sorted(whole)), tuple(sorted(few - whole)), kept, left_out)


_BEYOND = 16
"""Tokens to go beyond a threshold, or a quarter of it if that is more."""
_MOST_WHOLE = 1 << 39
_MOST_FEW = 1 << 42
_MOST_AT_THE_END = 1 << 36
"""Weights times tokens of a row: 2^39 are some ten seconds of two cores; few layers may take minutes."""
