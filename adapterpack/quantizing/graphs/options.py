"""Checks the options of a quantization: the scheme, its blocks and algorithm, the accuracy of products, the
head, and budgets.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack

from ...base import DequantizedCheckpoint
from ...errors import ConfigError, Unsupported, require_among, storage_errors
from ...io import without_none
from ...paths import StrPath
from .algorithm import ALGORITHMS
from .product import RoundingSetting
from .scheme import GRAPH_SCHEMES, GraphScheme
from .stored_weights import StoredWeights

BLOCK_SIZES = (16, 32, 64, 128, 256)
HEADS = ("int4", "int8", "float")
"""The types that the product that computes the logits may have."""
HEAD = "int8"
"""The default type: int4 would cost more accuracy there than anywhere else, and save only a few per cent of a
graph.
"""
ACCURACIES = ("exact", "fast")
"""``exact`` multiplies with the activations as they are; ``fast`` rounds them to int8 in blocks, as
MatMulNBits does with accuracy_level 4.
"""
CACHES = ("float", "int8")
"""The types of keys and values in the engine's graph: the graph's own type, or int8 with a scale for each
channel.
"""
STORED, TRAINED = "as-stored", "as-trained"
"""The schemes with the codes of the base: as it is stored, and as it was while the packs were trained."""
MOST_COMPENSATED = 512
"""The largest rank of a correction."""


class GraphQuantization(NamedTuple):
    """The checked options of quantizing a bundle's graphs.

    ``accuracy`` None: measurements decide. ``setting`` applies to every product, in a scheme of codes.
    ``calibration`` is the user's file of rows. ``compensate`` is the rank of the error correction, 0 for
    none. The budgets are for a scheme that searches. ``stored`` holds the codes of a quantized base, for a
    scheme ``of_base``.
    """

    scheme: str
    accuracy: str | None = None
    head: str = HEAD
    setting: RoundingSetting | None = None
    calibration: Path | None = None
    compensate: int = 0
    error_budget: float | None = None
    size_budget: int | None = None
    stored: StoredWeights | None = None

    @property
    def head_setting(self) -> RoundingSetting | None:
        """The setting of the product that computes the logits; None: it stays float."""
        return None if self.head == "float" else GRAPH_SCHEMES[self.head].setting


class GraphOptions(TypedDict, total=False):
    """The options of a quantization besides its scheme, as :func:`quantization` takes them; None means that
    the option is not set.
    """

    accuracy: str | None
    head: str | None
    block_size: int | None
    symmetric: bool | None
    algorithm: str | None
    calibration: StrPath | None
    compensate: int | None
    error_budget: float | None
    size_budget: int | None


def quantization(scheme: str, **options: Unpack[GraphOptions]) -> GraphQuantization:
    """Returns the checked options, if all of them exist and fit together.

    Raises:
        UnknownName: there is no such scheme, accuracy, head or algorithm.
        ConfigError: an option has no effect together with the others, or is out of range.
        Unsupported: no graph can be written in this scheme, or the algorithm does not round to its codes.
        StorageError: the calibration rows cannot be read.
    """
    given: dict[str, Any] = without_none(options)
    accuracy, head, calibration = (given.get(name) for name in ("accuracy", "head", "calibration"))
    if not (compensate := given.get("compensate", 0)):
        given.pop("compensate", None)
    chosen = GRAPH_SCHEMES[scheme]
    require_among("unknown accuracy", accuracy, ACCURACIES)
    require_among("unknown quantization of the head", head, HEADS)
    if chosen.of_base:
        raise Unsupported(
            "this scheme keeps the codes of a quantized base, which a bundle no longer holds",
            found=scheme,
            remedy="export the quantized base itself: that is what it becomes by default",
        )
    if chosen.refused:
        raise Unsupported(
            "no graph is written in this scheme",
            found=scheme,
            expected=", ".join(writable_schemes()),
            remedy=chosen.refused,
        )
    for name in given:
        if name not in chosen.takes | {"error_budget", "size_budget"}:
            option = "symmetric or --asymmetric" if name == "symmetric" else name.replace("_", "-")
            raise ConfigError(
                f"this scheme does not take --{option}",
                found=scheme,
                remedy=f"leave --{option} out",
            )
    setting = None if chosen.setting is None else _setting(chosen.setting, given)
    if not 0 <= compensate <= MOST_COMPENSATED:
        raise ConfigError(
            "a compensation has some rank",
            where="--compensate",
            expected=f"1 to {MOST_COMPENSATED}",
            found=compensate,
        )
    error_budget = given.get("error_budget")
    size_budget = given.get("size_budget")
    _require_budget(chosen, error_budget, size_budget)
    calibrated = setting is not None and ALGORITHMS[setting.algorithm].calibrated
    if setting is not None and calibrated and calibration is None:
        raise ConfigError(
            "this algorithm needs inputs of every product, which calibration rows give",
            found=setting.algorithm,
            remedy="give --calibration FILE.jsonl, with rows like those that the model will see",
        )
    smooths = setting is not None and not setting.block_size
    if calibration is not None and not (calibrated or smooths or compensate or chosen.budgeted):
        raise ConfigError(
            "these options use no calibration rows",
            where="--calibration",
            found=calibration,
            remedy="choose --algorithm gptq or awq, --compensate, or --scheme mixed or w8a8, or leave it out",
        )
    rows = None if calibration is None else Path(calibration)
    if rows is not None:
        with storage_errors(rows), rows.open("rb"):
            pass  # only opens the file: an error shows now, not after minutes of export
    return GraphQuantization(
        scheme, accuracy, head or HEAD, setting, rows, compensate, error_budget, size_budget
    )


def codes_of_base(scheme: str, base: DequantizedCheckpoint | None, accuracy: str | None) -> GraphQuantization:
    """Returns the options for graphs that store the codes of a quantized base; the base may be opened later.

    Raises:
        UnknownName: there is no such accuracy.
    """
    require_among("unknown accuracy", accuracy, ACCURACIES)
    return GraphQuantization(scheme, accuracy, "float", stored=None if base is None else StoredWeights(base))


def writable_schemes() -> list[str]:
    """Returns the schemes in which graphs can be written.

    Example:
        >>> writable_schemes()
        ['bf16', 'fp16', 'int2', 'int4', 'int8', 'mixed', 'w8a8']
    """
    return [name for name, scheme in GRAPH_SCHEMES.items() if not scheme.refused and not scheme.of_base]


def _setting(default: RoundingSetting, given: Mapping[str, Any]) -> RoundingSetting:
    """Returns the setting of a scheme with the options that are given."""
    block_size = given.get("block_size")
    if block_size is not None and block_size not in BLOCK_SIZES:
        raise ConfigError(
            "ONNX Runtime has no products on blocks of this size",
            where="--block-size",
            found=block_size,
            expected=", ".join(map(str, BLOCK_SIZES)),
        )
    changed = {name: given[name] for name in ("block_size", "symmetric", "algorithm") if name in given}
    setting = default._replace(**changed)
    rounds = ALGORITHMS[setting.algorithm]
    if setting.symmetric not in rounds.symmetric or setting.bits not in rounds.bits:
        raise Unsupported(
            "this algorithm does not round to such codes",
            where=setting.algorithm,
            found="symmetric" if setting.symmetric not in rounds.symmetric else f"{setting.bits} bits",
            remedy="leave --symmetric out, or choose --algorithm rtn, gptq or awq",
        )
    return setting


def _require_budget(scheme: GraphScheme, error: float | None, size: int | None) -> None:
    budgets = {"--error-budget": error, "--size-budget": size}
    given = [name for name, value in budgets.items() if value is not None]
    if len(given) != int(scheme.budgeted):
        what, expected = (
            ("bits are searched under one budget", "--error-budget or --size-budget")
            if scheme.budgeted
            else ("only --scheme mixed has a budget", "none")
        )
        raise ConfigError(what, where=scheme.name, found=" and ".join(given) or "none", expected=expected)
    if (error is not None and not 0 < error < 1) or (size is not None and not 0 < size < 1 << 50):
        raise ConfigError(
            "the budget is out of range",
            where=given[0],
            found=error if size is None else size,
            expected="a share between 0 and 1 of the outputs" if size is None else "bytes",
        )


def require_no_options(what: str, **given: object) -> None:
    """Checks that the caller sets no option of quantization where no graph is quantized.

    Raises:
        ConfigError: an option is set.
    """
    for name, value in given.items():
        if value is not None:
            option = name.replace("_", "-")
            raise ConfigError(
                f"{what}, so --{option} has no effect", found=value, remedy=f"leave --{option} out"
            )
