"""Divides a merge into jobs, and the jobs among machines."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ...base.codecs.storage import MAIN_PART
from ...errors import ConfigError
from ...io import Span
from .layout import Item, Shard
from .tensor_jobs import Convert, Copy, Fold, MergedTensor, Put, TensorJob

_CHUNK = 16 << 20
"""Bytes that one copy job copies."""


def jobs(shards: Sequence[Shard]) -> list[TensorJob]:
    """Returns all jobs of a merge in the order of the files. The same shards give the same list, so that a
    number identifies a job.
    """
    items = {
        shard.name: [piece for item in shard.items for piece in item.pieces or (item,)] for shard in shards
    }
    tensors = {item.place.name: MergedTensor(item, shard) for shard in shards for item in items[shard.name]}
    written_with = {
        tensor.item.source.name: tensor
        for tensor in tensors.values()
        if tensor.item.written_with is not None and tensor.item.source is not None
    }
    all_jobs = []
    for shard in shards:
        unchanged = []
        for item in items[shard.name]:
            if item.source is not None and item.written_with is None:
                unchanged.append(item)
            elif (job := _job(tensors[item.place.name], written_with)) is not None:
                all_jobs.append(job)
        all_jobs += [Copy(frozenset({shard.name}), span.nbytes, shard, span) for span in _spans(unchanged)]
    return all_jobs


def _job(tensor: MergedTensor, written_with: Mapping[str, MergedTensor]) -> TensorJob | None:
    """Returns the job that writes a tensor; None for a tensor that is written together with its weight."""
    item = tensor.item
    files = frozenset({tensor.shard.name})
    if item.value is not None:
        return Put(files, item.place.nbytes, tensor)
    if item.storage is None:
        return None
    if item.target is None:
        return Convert(files, item.place.nbytes, tensor, item.storage)
    parts = {
        role: tensor if role == MAIN_PART else written_with[name]
        for role, name in item.storage.writer.parts.items()
    }
    bias = None if item.target.bias is None else written_with[item.target.bias]
    outputs = [*parts.values(), *([] if bias is None else [bias])]
    return Fold(
        frozenset(output.shard.name for output in outputs),
        sum(output.item.place.nbytes for output in outputs),
        item.target,
        parts,
        bias,
    )


def _spans(items: Sequence[Item]) -> Iterator[Span]:
    """Yields the byte ranges of unchanged tensors in base and output: joins adjacent ones, and then cuts them
    into chunks.
    """
    spans: list[list[int]] = []
    for item in items:
        assert item.source is not None
        start = item.source.offset
        offset = item.place.offset
        nbytes = item.place.nbytes
        if spans and spans[-1][0] + spans[-1][2] == start and spans[-1][1] + spans[-1][2] == offset:
            spans[-1][2] += nbytes
        elif nbytes:
            spans.append([start, offset, nbytes])
    for start, offset, nbytes in spans:
        for done in range(0, nbytes, _CHUNK):
            yield Span(start + done, offset + done, min(_CHUNK, nbytes - done))


@dataclass(frozen=True)
class JobShare:
    """One machine's share of the work: number ``index`` (from 1) of ``count``."""

    index: int = 1
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def parse_share(text: str) -> JobShare:
    """Parses a share given as ``I/N``.

    Raises:
        ConfigError: the text has another form.

    Example:
        >>> parse_share("2/3")
        JobShare(index=2, count=3)
    """
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    share = JobShare(*map(int, match.groups())) if match else JobShare(0, 0)
    if not 1 <= share.index <= share.count:
        raise ConfigError(
            "this is not a part of the work",
            where="shard",
            expected="I/N with I from 1 to N",
            found=repr(text),
            remedy="give 1/2 on one machine and 2/2 on another",
        )
    return share


def jobs_of(all_jobs: Sequence[TensorJob], share: JobShare) -> list[int]:
    """Returns the numbers of the jobs that belong to a share.

    Machines never write into the same file, since network file systems may cache its pages: each file goes to
    one machine, together with the other files of its jobs; the largest come first, and each goes to the
    machine with the least work so far.
    """
    owner: dict[str, str] = {}

    def root(file: str) -> str:
        while owner.setdefault(file, file) != file:
            file = owner[file]
        return file

    for job in all_jobs:
        first, *others = sorted(job.files)
        for other in others:
            owner[root(other)] = root(first)
    sizes: dict[str, int] = {}
    for job in all_jobs:
        name = root(min(job.files))
        sizes[name] = sizes.get(name, 0) + job.nbytes
    loads = [0] * share.count
    assigned = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        assigned[name] = loads.index(min(loads))
        loads[assigned[name]] += sizes[name]
    return [
        number for number, job in enumerate(all_jobs) if assigned[root(min(job.files))] == share.index - 1
    ]
