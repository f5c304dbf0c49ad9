"""Weights of every quantized format, of random codes, by the layouts that the formats publish, each with its
values in float64.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

Shape = tuple[int, int]
SHAPE = ROWS, COLUMNS = 64, 96
GROUP = 32
PATH = "model.layers.0.mlp.up_proj"
NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)


class Stored:
    """Parts of one weight, the config that goes with them, and its values in float64, made from the layout
    that the format publishes.
    """

    def __init__(
        self,
        config: dict[str, Any],
        parts: dict[str, np.ndarray],
        values: np.ndarray,
        metadata: dict[str, str] | None = None,
    ):
        self.config, self.parts, self.values, self.metadata = config, parts, values, metadata or {}


def words(codes: np.ndarray, width: int) -> np.ndarray:
    """Integers ``[n, k]`` as a run of bits, the lowest first, cut into 32-bit words."""
    run = (codes[:, :, None] >> np.arange(width) & 1).reshape(len(codes), -1, 32).astype(np.uint64)
    return (run << np.arange(32, dtype=np.uint64)).sum(-1).astype(np.uint32).view(np.int32)


def bnb4(double: bool, block: int = 64, shape: Shape = SHAPE, seed: int = 0) -> Stored:
    rows, columns = shape
    rng = np.random.default_rng(3 + 10 * seed)
    codes, blocks = rng.integers(0, 16, shape), rows * columns // block
    flat = codes.reshape(-1)
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": block,
        "dtype": "bfloat16",
        "shape": list(shape),
    }
    parts = {"weight": (flat[::2] << 4 | flat[1::2]).astype(np.uint8)[:, None], "weight.quant_map": NF4}
    if double:
        absmax, offset = rng.integers(100, 256, blocks).astype(np.uint8), 0.05
        second, table = np.float32([0.04]), np.linspace(-1, 1, 256).astype(np.float32)
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        parts |= {"weight.absmax": absmax, "weight.nested_absmax": second, "weight.nested_quant_map": table}
        scales = table.astype(float)[absmax] * float(second[0]) + offset
    else:
        parts["weight.absmax"] = rng.uniform(0.02, 0.1, blocks).astype(np.float32)
        scales = parts["weight.absmax"].astype(float)
    parts["weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    values = (NF4.astype(float)[flat].reshape(blocks, block) * scales[:, None]).reshape(shape)
    return Stored({"quant_method": "bitsandbytes", "load_in_4bit": True}, parts, values)


def bnb8(shape: Shape = SHAPE, seed: int = 0) -> Stored:
    rows, _ = shape
    rng = np.random.default_rng(4 + 10 * seed)
    codes, scale = (
        rng.integers(-127, 128, shape).astype(np.int8),
        rng.uniform(0.02, 0.1, rows).astype(np.float32),
    )
    return Stored(
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"weight": codes, "SCB": scale, "weight_format": np.uint8(0)},
        codes * scale.astype(float)[:, None] / 127,
    )


def gptq(
    width: int, sym: bool, act_order: bool, version: str = "gptq", shape: Shape = SHAPE, seed: int = 0
) -> Stored:
    rows, columns = shape
    rng = np.random.default_rng(5 + 10 * seed)
    top, groups, less = 2**width - 1, columns // GROUP, int(version == "gptq")
    codes = rng.integers(0, top + 1, (columns, rows))
    zeros = np.full((groups, rows), 2 ** (width - 1)) if sym else rng.integers(1, top + 1, (groups, rows))
    scales = rng.uniform(0.005, 0.02, (groups, rows)).astype(np.float16)
    index = np.arange(columns) // GROUP
    # the same of layers that read the same
    index = np.random.default_rng(columns).permutation(index) if act_order else index
    parts = {
        "qweight": words(codes.T, width).T,
        "qzeros": words(zeros - less, width),
        "scales": scales,
        "g_idx": index.astype(np.int32),
    }
    config = {
        "quant_method": "gptq",
        "bits": width,
        "group_size": GROUP,
        "sym": sym,
        "desc_act": act_order,
        "checkpoint_format": version,
    }
    return Stored(config, parts, (scales.astype(float)[index] * (codes - zeros[index])).T)


def awq(shape: Shape = SHAPE, seed: int = 0) -> Stored:
    rows, columns = shape
    rng = np.random.default_rng(6 + 10 * seed)
    codes, zeros = rng.integers(0, 16, (columns, rows)), rng.integers(0, 16, (columns // GROUP, rows))
    scales, order = rng.uniform(0.005, 0.02, zeros.shape).astype(np.float16), [0, 2, 4, 6, 1, 3, 5, 7]
    mixed = [
        words(each.reshape(len(each), -1, 8)[:, :, order].reshape(each.shape), 4) for each in (codes, zeros)
    ]
    index = np.arange(columns) // GROUP
    return Stored(
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True},
        {"qweight": mixed[0], "qzeros": mixed[1], "scales": scales},
        (scales.astype(float)[index] * (codes - zeros[index])).T,
    )


def torchao(kind: str, shape: Shape = SHAPE, seed: int = 0, path: str = PATH) -> Stored:
    rows, columns = shape
    rng = np.random.default_rng(7 + 10 * seed)
    wide = {"Int8Tensor": columns, "Float8Tensor": columns}.get(kind, GROUP)
    data: dict[str, Any] = {"block_size": [1, wide]}
    scale = rng.uniform(0.001, 0.01, (rows, columns // wide)).astype(np.float32)
    parts = {"_weight_scale": scale}
    if kind == "Float8Tensor":
        parts["_weight_qdata"] = rng.normal(0, 20, shape).astype(ml_dtypes.float8_e4m3fn)
    else:
        half = 8 if kind == "IntxUnpackedToInt8Tensor" else 128
        parts["_weight_qdata"] = rng.integers(-half, half, shape).astype(np.int8)
        parts["_weight_zero_point"] = np.zeros(scale.shape, np.int8)
        if half == 8:
            data["target_dtype"] = {"_type": "torch.dtype", "_data": "int4"}
    values = parts["_weight_qdata"].astype(float) * np.repeat(scale.astype(float), wide, 1)
    return Stored(
        {"quant_method": "torchao", "quant_type": {}},
        parts,
        values,
        {f"{path}.weight": json.dumps({"_type": kind, "_data": data})},
    )


def compressed(kind: str, sym: bool = True, shape: Shape = SHAPE, seed: int = 0) -> Stored:
    rows, columns = shape
    rng = np.random.default_rng(8 + 10 * seed)
    weights: dict[str, Any] = {
        "num_bits": 4 if kind == "packed" else 8,
        "type": "float" if kind == "float" else "int",
        "symmetric": sym,
        "strategy": "group" if kind == "packed" else "channel",
        "group_size": GROUP if kind == "packed" else None,
    }
    wide = GROUP if kind == "packed" else columns
    scale = rng.uniform(0.001, 0.01, (rows, columns // wide)).astype(ml_dtypes.bfloat16)
    zero = np.zeros(scale.shape, int) if sym else rng.integers(-8, 8, scale.shape)
    if kind == "packed":
        codes = rng.integers(-8, 8, shape)
        parts = {"weight_packed": words(codes + 8, 4), "weight_shape": np.array(list(shape))}
        if not sym:
            parts["weight_zero_point"] = words((zero + 8).T, 4).T
    elif kind == "float":
        codes = rng.normal(0, 20, shape).astype(ml_dtypes.float8_e4m3fn)
        parts = {"weight": codes}
    else:
        codes = rng.integers(-128, 128, shape).astype(np.int8)
        parts = {"weight": codes}
    values = (codes.astype(float) - np.repeat(zero, wide, 1)) * np.repeat(scale.astype(float), wide, 1)
    return Stored(
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}},
        {**parts, "weight_scale": scale},
        values,
    )


def fp8(shape: Shape = SHAPE, seed: int = 0) -> Stored:
    """Tiles of 48 by 40: neither divides its side."""
    rows, columns = shape
    rng = np.random.default_rng(9 + 10 * seed)
    codes = rng.normal(0, 40, shape).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(0.001, 0.01, (-(-rows // 48), -(-columns // 40))).astype(np.float32)
    spread = np.repeat(np.repeat(scale.astype(float), 48, 0), 40, 1)[: shape[0], : shape[1]]
    return Stored(
        {"quant_method": "fp8", "weight_block_size": [48, 40]},
        {"weight": codes, "weight_scale_inv": scale},
        codes.astype(float) * spread,
    )


FORMATS: dict[str, Callable[..., Stored]] = {
    "nf4": partial(bnb4, False),
    "nf4 double": partial(bnb4, True),
    "nf4 odd blocks": partial(bnb4, False, 256),
    "int8": bnb8,
    **{
        f"gptq {width}{' sym' if sym else ''}{' act-order' if act_order else ''}": partial(
            gptq, width, sym, act_order
        )
        for width, sym, act_order in (
            (2, False, False),
            (3, True, True),
            (4, True, True),
            (4, False, True),
            (4, True, False),
            (8, False, False),
        )
    },
    "gptq v2": partial(gptq, 4, False, False, "gptq_v2"),
    "awq": awq,
    **{
        f"torchao {kind}": partial(torchao, kind)
        for kind in ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")
    },
    "packed": partial(compressed, "packed"),
    "packed with zero points": partial(compressed, "packed", False),
    "ints": partial(compressed, "int"),
    "floats": partial(compressed, "float"),
    "fp8": fp8,
}
"""Name -> what makes one weight of random codes, of 64 rows and 96 columns or of another ``shape``, others
for another ``seed``.
"""
