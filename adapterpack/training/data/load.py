"""Loads the rows of a data source, and collates encoded rows into batches."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import (
    Audio,
    ClassLabel,
    Dataset,
    Image,
    are_progress_bars_disabled,
    concatenate_datasets,
    disable_progress_bars,
    enable_progress_bars,
    load_dataset,
    load_dataset_builder,
)
from datasets.data_files import DataFilesDict, get_data_patterns
from datasets.load import infer_module_for_data_files
from datasets.packaged_modules import _EXTENSION_TO_MODULE, _MODULE_TO_EXTENSIONS
from datasets.packaged_modules.audiofolder.audiofolder import AudioFolder
from datasets.utils.info_utils import is_small_dataset

from ...errors import ConfigError, nearest
from ...library_errors import library_errors
from ...runtime.media import DATA, PicturesOfRow
from ...runtime.media.inputs import extend
from ...runtime.media.pictures import arrays_of
from ...tasks import TaskTraining
from ...tasks.data import IGNORED, OWN_COLUMNS, DataReport, Labels, Row, report_of
from ...tasks.data.problems import labels_in as of_values
from ...tasks.data.problems import require_label
from ..config.sources import Source
from .decompress import KINDS, files_below, files_of, kind_of, options_of, part_of, readable
from .limits import RowPlace, require_bounded, require_short_texts

_SHORT = 64
"""Bytes up to which a file may be an empty list; a longer file has rows."""
_HUB = "hf://datasets/"
_MEDIA = ("image", "images", "audio", "mask", "depth_map")
"""Columns that may hold paths of files."""
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Files with further columns for a folder of images or recordings."""


def load_rows(source: Source | str, report: DataReport | None = None) -> Dataset:
    """Returns the rows of data files, of a folder, or of a data set on the hub.

    Lines that are not rows are skipped if the report says so.

    Raises:
        StorageError: a file is missing.
        ConfigError: the data cannot be read, or has no rows.
    """
    source = Source(source) if isinstance(source, str) else source
    report = report or DataReport(source.path)
    files = files_of(source)
    with _quiet_datasets():
        rows = _of_files(source, files, report) if files else _of_data_set(source)
    require_short_texts(rows, source.path)
    if not len(rows):
        raise ConfigError("the data holds no rows", where=source.path)
    if missing := sorted(set(source.columns.values()) - set(rows.column_names)):
        raise ConfigError(
            "the data has no such column",
            where=f"{source.path}, columns",
            found=", ".join(missing),
            expected=", ".join(rows.column_names),
            remedy=_columns_remedy(source.columns, missing[0], rows.column_names),
        )
    if not 0 <= source.shards_idx < source.shards:
        raise ConfigError(
            "there is no such part of the data",
            where=f"{source.path}, shards_idx",
            expected=f"at least 0, and less than shards, {source.shards}",
            found=source.shards_idx,
        )
    if source.shards > 1:
        rows = rows.shard(source.shards, source.shards_idx, contiguous=False)
    if source.share is not None or source.max_samples is not None:
        taken = len(rows) if source.share is None else max(1, round(source.share * len(rows)))
        taken = min(taken, source.max_samples or taken, len(rows))
        # A folder may hold one class after the other.
        step = len(rows) if Path(source.path).is_dir() else taken
        rows = rows.select([number * step // taken for number in range(taken)])
    named = {theirs: ours for ours, theirs in source.columns.items()}
    hidden = {*named.values()} & {*rows.column_names} - named.keys()
    rows = _disable_decoding(rows.remove_columns([*hidden])).rename_columns(named)
    near = dict.fromkeys(file.parent for file in files)
    folders = [Path(), *near] if source.media_dir is None else [Path(source.media_dir)]
    with _quiet_datasets():
        return _with_names(_from_folders(rows, folders))


def _from_folders(rows: Dataset, folders: Sequence[Path]) -> Dataset:
    """Returns the rows with the paths of their media starting from the first folder that has the file."""

    def place(value: Any) -> Any:
        if isinstance(value, list):
            return [place(one) for one in value]
        if not isinstance(value, str) or value.startswith(DATA):
            return value
        paths = [str(folder / value) for folder in folders]
        # Of texts that are no paths, Path.exists may raise.
        return next(filter(os.path.exists, paths), paths[0])

    types = {name: getattr(feature, "feature", feature) for name, feature in rows.features.items()}
    for name in _MEDIA:
        if getattr(types.get(name), "dtype", "").endswith("string"):
            added = rows.add_column(f"{name} placed", place(rows[name][:]))
            rows = added.remove_columns(name).rename_column(f"{name} placed", name)
    return rows


def _columns_remedy(columns: Mapping[str, str], missing: str, found: list[str]) -> str:
    """Returns what to do about missing columns; if the mapping was given the wrong way round, returns it
    reversed.
    """
    if not {*columns} <= {*found}:
        return f"{nearest(missing, found)}; columns is {{our name: yours}}, such as {{text: message}}"
    turned = ", ".join(f"{theirs}: {ours}" for ours, theirs in columns.items())
    return f"columns is {{our name: yours}}, so the other way round: columns: {{{turned}}}"


def _of_files(source: Source, files: list[Path], report: DataReport) -> Dataset:
    """Returns the rows of all files; files of one kind are read together."""
    kinds = [str(kind) for kind in dict.fromkeys(map(kind_of, files))]
    tables = []
    for kind in kinds:
        names = [file for file in files if kind_of(file) == kind]
        with readable(names, report) as (paths, options):
            alike: dict[tuple[tuple[str, Any], ...], list[tuple[Path, Path]]] = {}
            for path, name in zip(paths, names, strict=True):
                require_bounded(path, name)
                if not _is_empty(path, kind):
                    alike.setdefault(tuple(options_of(kind, path).items()), []).append((path, name))
            for own, pairs in alike.items():
                with _reading(RowPlace(*zip(*pairs, strict=True))):
                    part = {part_of(source.split): [str(path) for path, _ in pairs]}
                    tables.append(
                        load_dataset(
                            KINDS[kind].builder, data_files=part, split=source.split, **dict(own), **options
                        )
                    )
    if not tables:
        raise ConfigError(
            "the data file is empty" if len(files) == 1 else "the data files are empty", where=source.path
        )
    with _reading(source.path):
        # Readers of different file kinds use different types for the same strings.
        first = tables[0].features
        return (
            tables[0] if len(tables) == 1 else concatenate_datasets([table.cast(first) for table in tables])
        )


def _is_empty(path: Path, kind: str) -> bool:
    """Whether a file has no rows: it is empty, blank or an empty list. ``datasets`` reports such files with
    an obscure error.
    """
    if path.stat().st_size > _SHORT:
        return False
    return path.read_bytes().strip() in ((b"", b"[]", b"{}") if KINDS[kind].builder == "json" else (b"",))


def _of_data_set(source: Source) -> Dataset:
    """Returns the rows of a folder, or of a data set on the hub; the files of the latter must be in its own
    repository.

    Raises:
        ConfigError: a data set on the hub names files elsewhere.
    """
    if Path(source.path).is_dir():
        return _of_folder(source)
    named = source.data_files
    with _reading(source.path):
        builder = load_dataset_builder(
            source.path,
            source.name,
            data_files=list(named) if isinstance(named, tuple) else named,
            revision=source.revision,
        )
        files = [str(file) for files in (builder.config.data_files or {}).values() for file in files]
        # A data set's card may name any URL or local path as its files; accept only those of its own
        # repository.
        own = tuple(f"{_HUB}{source.path}{end}" for end in "@/")
        if outside := [file for file in files if not file.startswith(own)]:
            raise ConfigError(
                "a file of a hub data set lies outside of it",
                where=source.path,
                found=outside[0],
                expected=own[0],
                remedy="fetch it yourself, where you trust it, and name the file",
            )
        builder.download_and_prepare()
        return builder.as_dataset(split=source.split, in_memory=is_small_dataset(builder.info.dataset_size))


def _of_folder(source: Source) -> Dataset:
    """Returns the rows of a folder, with splits as ``datasets`` derives them from file names; its card is not
    read, since it could name files elsewhere.

    Raises:
        FormatError: a link leads out of the folder.
        ConfigError: the source names a configuration of the card, or files outside of the folder.
    """
    folder = Path(source.path).resolve()
    if source.name is not None or source.revision is not None:
        raise ConfigError(
            "a folder has no such setting: its card is not read",
            where=source.path,
            found="name or revision",
            remedy="name the files of this part under data_files",
        )
    named = source.data_files
    named = (named,) if isinstance(named, str) else named
    for name in named or ():
        if Path(name).is_absolute() or ".." in Path(name).parts or "://" in name:
            raise ConfigError("a file of a folder lies in it", where=f"{source.path}, data_files", found=name)
    files = files_below(folder)
    with _reading(source.path):
        patterns = get_data_patterns(str(folder)) if named is None else {"train": list(named)}
        found = DataFilesDict.from_patterns(
            patterns, base_path=str(folder), allowed_extensions=[*_EXTENSION_TO_MODULE, ".zip"]
        )
        kind, options = infer_module_for_data_files(found, path=source.path)
        found = found.filter(extensions=_MODULE_TO_EXTENSIONS[kind], file_names=list(_METADATA))
        for file in map(Path, found.get(part_of(source.split), ())):
            if file not in files:
                raise ConfigError("a file of a folder lies in it", where=source.path, found=file)
            if kind_of(file) is not None:
                require_bounded(file)
        paths = {str(split): list(map(str, some)) for split, some in found.items()}
        builder = load_dataset_builder(kind, data_files=paths, **options)
        if isinstance(builder, AudioFolder):
            builder.BASE_FEATURE = _Recording
        builder.download_and_prepare()
        return builder.as_dataset(split=source.split)


class _Recording(Audio):
    """A recording by its path, for which the feature of ``datasets`` needs torchcodec."""

    def encode_example(self, value: str) -> dict[str, Any]:  # type: ignore[override] # of a folder: paths
        """Returns what a table holds."""
        return {"bytes": None, "path": value}


def _reading(where: object) -> Any:
    """Turns errors of ``datasets`` into a :class:`ConfigError`."""
    return library_errors(
        "datasets",
        "the data cannot be read",
        where=where,
        kind=ConfigError,
        expected=(
            "json, jsonl, csv, tsv, txt, parquet or xlsx rows, a folder of them or of pictures, or a hub "
            "data set"
        ),
    )


def _disable_decoding(rows: Dataset) -> Dataset:
    """Returns the rows with images and recordings as bytes or paths; tasks decode them, within limits."""
    for name, feature in rows.features.items():
        if isinstance(feature, Image | Audio):
            rows = rows.cast_column(name, type(feature)(decode=False))
    return rows


def _with_names(rows: Dataset) -> Dataset:
    """Returns the rows with class numbers replaced by class names, where the data declares them."""

    def classes(feature: Any) -> bool:
        if isinstance(feature, dict):
            return any(map(classes, feature.values()))
        return isinstance(getattr(feature, "feature", feature), ClassLabel)

    def named(value: Any, feature: Any) -> Any:
        # The element type, for a list of classes.
        feature = getattr(feature, "feature", feature)
        if isinstance(value, list):
            return [named(item, feature) for item in value]
        if isinstance(value, dict) and isinstance(feature, dict):
            return {key: named(item, feature[key]) for key, item in value.items()}
        if not isinstance(feature, ClassLabel):
            return value
        return None if value is None or value < 0 else feature.int2str(value)

    for name, feature in rows.features.items():
        if classes(feature):
            rows = rows.remove_columns(name).add_column(name, [named(value, feature) for value in rows[name]])
    return rows


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Disables the progress bars of ``datasets`` inside the block."""
    disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            enable_progress_bars()


def labels_in(rows: Dataset, training: TaskTraining, where: object, problem: str | None = None) -> Labels:
    """Returns the labels in the rows of a labelled task; without ``problem``, their values decide the problem
    type.

    Raises:
        ConfigError: the column of labels is missing, a row has no label, or there is nothing to distinguish.
    """
    column = label_column(rows, training)
    if column is None:
        raise ConfigError(
            "the rows have no column of labels",
            where=where,
            expected=" or ".join(training.label_columns),
            found=", ".join(rows.column_names),
            remedy=OWN_COLUMNS,
        )
    values = []
    report = report_of(where)
    for number, value in enumerate(rows[column]):
        with report.row(number) as place:
            require_label(value, place)
            values.append(value if training.parts is None else training.parts(value))
    several = training.parts is not None
    return of_values([label for labels in values for label in labels] if several else values, where, problem)


def label_column(rows: Dataset, training: TaskTraining) -> str | None:
    """Returns the name of the label column, or None."""
    return next((name for name in training.label_columns if name in rows.column_names), None)


@dataclass(frozen=True)
class Collator:
    """Collates rows into a batch.

    Lists are padded on the right to the longest, with an attention mask for ids; callable values, such as
    images that are decoded late, are called. ``constants`` are added to every batch; ``dtype`` is that of
    floats. Rows with position ids are packed and get no mask: their padding comes after everything that is
    learned.
    """

    pad_token_id: int
    constants: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns ``input_ids`` and ``attention_mask`` ``[batch, longest]`` and the other columns: lists as
        ``[batch, longest]``, numbers as ``[batch]``, tuples as ``[batch, n]``, arrays as ``[batch, ...]``.
        """
        batch = dict(self.constants)
        rows = [_call_values(row) for row in rows]
        for key in rows[0]:
            values = [row[key] for row in rows]
            if isinstance(values[0], PicturesOfRow):
                arrays = arrays_of([picture for row in values for picture in row.pictures])
                batch |= {name: self._cast(torch.from_numpy(array)) for name, array in arrays.items()}
                continue
            if isinstance(values[0], Mapping):
                batch[key] = [
                    {name: torch.from_numpy(array) for name, array in one.items()} for one in values
                ]
                continue
            if isinstance(values[0], list):
                width = max(map(len, values))
                is_ids = key.endswith("input_ids")
                fill = self.pad_token_id if is_ids else IGNORED if key == "labels" else 0
                if is_ids and "position_ids" not in rows[0]:
                    mask = [[1] * len(value) + [0] * (width - len(value)) for value in values]
                    batch[key.replace("input_ids", "attention_mask")] = torch.tensor(mask)
                values = [[*value, *[fill] * (width - len(value))] for value in values]
            tensor = (
                torch.from_numpy(np.stack(extend(values, IGNORED if key == "labels" else 0)))
                if isinstance(values[0], np.ndarray)
                else torch.tensor(values)
            )
            batch[key] = self._cast(tensor)
        return batch

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor


def _call_values(row: Row) -> dict[str, Any]:
    """Returns a row with its callable values called; where one gives several inputs by name, they take its
    place.
    """
    called: dict[str, Any] = {}
    for key, value in row.items():
        found = value() if callable(value) else value
        called |= found if isinstance(found, Mapping) else {key: found}
    return called


def token_count(row: Row) -> int:
    """Returns the number of tokens of the longest text in an encoded row; 0 if it has none."""
    return max((len(value) for key, value in row.items() if key.endswith("input_ids")), default=0)
