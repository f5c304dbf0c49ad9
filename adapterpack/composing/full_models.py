"""Merges full models by the rules of composition: every tensor is streamed from all checkpoints, merged, and
written, whatever its size.

A rule sees the changes that the models make to a base, or, without one, their weights themselves. A rule of
entries gets them in blocks of rows; for a rule that is a sum, inner products are measured in one pass, and
the sum is written in another. A vector is one row.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..adapter_methods import row_blocks
from ..base import CONFIG, Checkpoint, copy_carried, dtypes, require_plain
from ..errors import BaseMismatch, NonFinite, Unsupported, storage_errors
from ..io import (
    DTYPES,
    FLOATS,
    Progress,
    TensorInfo,
    Ticker,
    all_finite,
    in_order,
    one_thread_each,
    open_descriptor,
    output_folder,
    plan,
    read_into,
    strict_json,
    write_all,
)
from ..lowrank import RowBlocks, Term
from ..merging.checkpoint import Item, Shard, plain_config, require_outside
from ..merging.checkpoint.layout import index
from ..merging.checkpoint.stream import create_files
from ..paths import StrPath
from .mergekit_file import MergekitFile, TensorValues, layers_of
from .rules.entries import Coordinates
from .rules.rule import RULES, Arguments, Rule

RECORD = "adapterpack.compose.json"
"""The file in the merged checkpoint that says what it was made of."""
_BLOCK = 1 << 20


class StoredRows(NamedTuple):
    """A tensor of a checkpoint as the rows of a matrix, read from its file block by block."""

    file: Path
    info: TensorInfo

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``: the first axis and all others; a vector is one row."""
        shape = self.info.shape if len(self.info.shape) > 1 else (1, *self.info.shape)
        return shape[0], int(np.prod(shape[1:]))

    @property
    def entries(self) -> int:
        """The number of entries."""
        return self.shape[0] * self.shape[1]

    def raw(self, rows: slice) -> np.ndarray:
        """Returns these rows as they are stored."""
        values = np.empty((rows.stop - rows.start, self.shape[1]), DTYPES[self.info.dtype])
        with storage_errors(self.file), open_descriptor(self.file, os.O_RDONLY) as file:
            read_into(file, values, self.info.offset + rows.start * self.shape[1] * values.itemsize)
        return values

    def read(self, rows: slice) -> np.ndarray:
        """Returns these rows in float32, of a float64 tensor in float64."""
        values = self.raw(rows)
        return values.astype(np.result_type(values.dtype, np.float32), copy=False)


class MergedModels(NamedTuple):
    """What was written: the folder, the number of tensors that were merged and copied, and the bytes."""

    out: str
    merged: int
    copied: int
    bytes: int


def merge_models(
    file: MergekitFile, folders: Mapping[str, Path], out: StrPath, *, seed: int, progress: Progress | None
) -> MergedModels:
    """Merges the full models of a mergekit file into a new checkpoint, which has the config and the tokenizer
    of its base model, or else of its first model.

    Sums are in float32 (float64 for float64 tensors) and are rounded once. Memory: a few blocks of rows of
    all models for each thread.

    Args:
        file: the models, the rule and its parameters.
        folders: the checkpoint of each model, by its name in the file.
        out: the new folder.
        seed: of a rule's random choices.
        progress: called with (bytes done, bytes in all).

    Raises:
        BaseMismatch: the models have other tensors, or tensors of other shapes.
        Unsupported: a model is quantized, or the rule needs factors of adapters.
        NonFinite: a merged tensor holds NaN or infinity.
    """
    rule = RULES[file.rule]
    if not (rule.coefficients or rule.mix or rule.merge):
        raise Unsupported(
            "the rule needs adapters",
            where=f"rule {rule.name}",
            remedy="make one of each model: adapterpack extract MODEL BASE -o PACK",
        )
    require_outside(Path(out), list(folders.values()))
    models = {name: Checkpoint(folder) for name, folder in folders.items()}
    donor = models[file.donor.name]
    layers = layers_of(donor.stored)
    file.require_whole(layers)
    for checkpoint in models.values():
        require_plain(checkpoint)
        _require_alike(checkpoint, donor)
    params = file.params | ({"seed": seed} if "seed" in rule.parameters else {})
    arguments = rule.arguments(params)
    dtype = None if file.dtype is None else dtypes.parse(file.dtype)
    shards = _shards(donor, dtype)
    ticker = Ticker(sum(shard.size for shard in shards), progress)
    places = [(item.place, shard.name) for shard in shards for item in shard.items]

    def write(place: tuple[TensorInfo, str]) -> bool:
        info, shard = place
        stored = {
            name: StoredRows(model.source(info.name).path, model.stored[info.name])
            for name, model in models.items()
        }
        own, merges = stored[donor_name], donor.stored[info.name].dtype in FLOATS
        blocks: RowBlocks
        if merges:
            base = None if file.base is None else stored[file.base.name]
            others = [stored[model.name] for model in file.models]
            values = file.values(info.name, own.entries, layers)
            names = [model.name for model in file.models]
            blocks = _merge_rows(rule, arguments, names, others, base, values, info.name)
        else:
            blocks = ((rows, own.raw(rows)) for rows in row_blocks(*own.shape, _BLOCK))
        kind = DTYPES[info.dtype]
        with open_descriptor(folder / shard, os.O_WRONLY) as sink:
            for rows, merged in blocks:
                with np.errstate(over="ignore"):
                    rounded = np.ascontiguousarray(merged, dtype=kind)
                if merges and not all_finite(rounded):
                    raise NonFinite(
                        "the merged tensor holds NaN or infinity",
                        where=info.name,
                        remedy="see which of the models holds it, or choose a wider dtype",
                    )
                write_all(sink, rounded, info.offset + rows.start * own.shape[1] * kind.itemsize)
                ticker.add(rounded.nbytes)
        return merges

    donor_name = file.donor.name
    with output_folder(out) as folder:
        create_files(shards, folder)
        with one_thread_each():
            merged = list(in_order(write, places))
        copy_carried(donor.folder, folder)
        if donor.config and dtype is not None:
            _write_json(folder / CONFIG, plain_config(donor.config, dtypes.TORCH[dtype]))
        if (table := index(donor, shards)) is not None:
            _write_json(folder / donor.index_name, table)
        _write_json(folder / RECORD, _record(file, models, arguments))
        for checkpoint in models.values():
            checkpoint.require_unchanged()
    return MergedModels(str(out), sum(merged), len(merged) - sum(merged), sum(shard.size for shard in shards))


def _merge_rows(
    rule: Rule,
    arguments: Arguments,
    names: Sequence[str],
    models: Sequence[StoredRows],
    base: StoredRows | None,
    values: TensorValues,
    name: str,
) -> RowBlocks:
    """Yields the rows of a merged tensor in blocks."""
    shape = models[0].shape
    kept = [index for index, weight in enumerate(values.weights) if weight]

    def take(rows: slice) -> np.ndarray:
        read = [models[index].read(rows) for index in kept]
        return np.stack(read if base is None else [one - base.read(rows) for one in read])

    nothing = np.zeros((1, 1), np.float32)
    terms = tuple(
        Term(nothing, nothing, values.weights[index], f"{names[index]}:{name}", own=values.own[index])
        for index in kept
    )
    view = Coordinates(terms, shape, take)
    merged: RowBlocks
    if not kept:
        merged = ((rows, np.zeros_like(models[0].read(rows))) for rows in row_blocks(*shape, _BLOCK))
    elif rule.merge is not None:
        merged = rule.merge(view, **arguments).blocks()
    else:
        merged = _sum(view, _coefficients(rule, arguments, view), _lines(arguments, shape))
    for rows, change in merged:
        yield rows, change if base is None else base.read(rows) + change


def _coefficients(rule: Rule, arguments: Arguments, view: Coordinates) -> np.ndarray:
    """Returns the factors ``[L, T]`` of a rule that is a sum, of the whole tensor or of each of its lines."""
    weights = [term.weight for term in view.terms]
    if rule.coefficients is not None:
        return np.array([rule.coefficients(weights, **arguments)])
    assert rule.mix is not None
    count = len(weights)
    (m, n) = view.shape
    per = _lines(arguments, view.shape)
    products = np.zeros(({"row": m, "column": n}.get(per, 1), count, count))
    for rows in row_blocks(m, n, _BLOCK // count):
        wide = view.take(rows).astype(np.float64)
        if per == "row":
            products[rows] = np.einsum("tbn,ubn->btu", wide, wide)
        elif per == "column":
            products += np.einsum("tbn,ubn->ntu", wide, wide)
        else:
            flat = wide.reshape(count, -1)
            products[0] += flat @ flat.T
    return rule.mix(products, weights, **arguments)


def _lines(arguments: Arguments, shape: tuple[int, int]) -> str:
    """Returns what a rule looks at by itself: the tensor, each row or each column; a vector has one row."""
    per = str(arguments.get("per", "tensor"))
    return "row" if per == "column" and shape[0] == 1 else per


def _sum(view: Coordinates, factors: np.ndarray, per: str) -> RowBlocks:
    """Yields the rows of ``sum_t c_t x_t``; ``factors`` are ``[L, T]``."""
    for rows in row_blocks(*view.shape, _BLOCK // len(view.terms)):
        block = view.take(rows)
        lines = (
            factors[rows, :, None]
            if per == "row"
            else factors.T[None]
            if per == "column"
            else factors[:, :, None]
        )
        yield (
            rows,
            np.einsum("btn,tbn->bn", np.broadcast_to(lines, (*block.shape[1::-1], block.shape[2])), block),
        )


def _require_alike(model: Checkpoint, donor: Checkpoint) -> None:
    for name in dict.fromkeys((*donor.stored, *model.stored)):
        found, expected = model.stored.get(name), donor.stored.get(name)
        if found is None or expected is None or found.shape != expected.shape:
            raise BaseMismatch(
                "the models do not have the same tensors",
                where=f"{model.folder}, {name}",
                expected="none"
                if expected is None
                else f"shape {list(expected.shape)}, as in {donor.folder}",
                found="none" if found is None else f"shape {list(found.shape)}",
                remedy="merge models of one architecture and one vocabulary",
            )


def _shards(donor: Checkpoint, dtype: str | None) -> list[Shard]:
    """Returns the files of the output: those of the donor, with the same tensors."""
    shards = []
    for name, file in donor.files.items():
        entries = [
            (info.name, dtype if dtype is not None and info.dtype in FLOATS else info.dtype, info.shape)
            for info in sorted(file.tensors.values(), key=lambda info: -DTYPES[info.dtype].itemsize)
        ]
        header, places = plan(entries, {"format": "pt"})
        shards.append(Shard(name, file.path, header, tuple(map(Item, places.values()))))
    return shards


def _record(file: MergekitFile, models: Mapping[str, Checkpoint], arguments: Arguments) -> dict[str, Any]:
    merged = [{**_source(models[model.name]), "settings": dict(model.settings)} for model in file.models]
    base = None if file.base is None else _source(models[file.base.name])
    settings = [dict(settings) for settings in file.settings]
    return {
        "rule": file.rule,
        "params": dict(arguments),
        "base": base,
        "models": merged,
        "settings": settings,
    }


def _source(model: Checkpoint) -> dict[str, str]:
    return {"name": model.name, "structure": model.structure, "probe": model.probe}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_bytes(strict_json.canonical(dict(value)))
