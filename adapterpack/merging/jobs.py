"""The work of a merge as a list of jobs, and how it is shared out among machines."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..base.codecs.storage import MAIN_PART
from ..errors import ConfigError
from ..io.byte_ranges import Span
from .layout import Item, Shard
from .tensors import Convert, Copy, Fold, Job, Put, Tensor

_CHUNK = 16 << 20
"""Bytes of one job that copies."""


def jobs(shards: Sequence[Shard]) -> list[Job]:
    """All jobs of a merge, in the order of the files: the same list for the same shards, so that a job is known by its number."""
    tensors = {item.place.name: Tensor(item, shard) for shard in shards for item in shard.items}
    beside = {tensor.item.source.name: tensor for tensor in tensors.values()
              if tensor.item.written_with is not None and tensor.item.source is not None}
    found: list[Job] = []
    for shard in shards:
        unchanged = []
        for item in shard.items:
            if item.source is not None and item.written_with is None:
                unchanged.append(item)
            elif (job := _job(tensors[item.place.name], beside)) is not None:
                found.append(job)
        found += [Copy(frozenset({shard.name}), span.nbytes, shard, span) for span in _spans(unchanged)]
    return found


def _job(tensor: Tensor, beside: Mapping[str, Tensor]) -> Job | None:
    """What writes a tensor; None where the job of its weight does, which writes all that changes together."""
    item, files = tensor.item, frozenset({tensor.shard.name})
    if item.value is not None:
        return Put(files, item.place.nbytes, tensor)
    if item.storage is None:
        return None
    if item.target is None:
        return Convert(files, item.place.nbytes, tensor, item.storage)
    parts = {role: tensor if role == MAIN_PART else beside[name] for role, name in item.storage.writer.parts.items()}
    bias = None if item.target.bias is None else beside[item.target.bias]
    every = [*parts.values(), *([] if bias is None else [bias])]
    return Fold(frozenset(each.shard.name for each in every), sum(each.item.place.nbytes for each in every), item.target, parts, bias)


def _spans(items: Sequence[Item]) -> Iterator[Span]:
    """Where unchanged tensors lie and go, neighbours joined, cut into chunks."""
    spans: list[list[int]] = []
    for item in items:
        assert item.source is not None
        start, offset, nbytes = item.source.offset, item.place.offset, item.place.nbytes
        if spans and spans[-1][0] + spans[-1][2] == start and spans[-1][1] + spans[-1][2] == offset:
            spans[-1][2] += nbytes
        elif nbytes:
            spans.append([start, offset, nbytes])
    for start, offset, nbytes in spans:
        for done in range(0, nbytes, _CHUNK):
            yield Span(start + done, offset + done, min(_CHUNK, nbytes - done))


@dataclass(frozen=True)
class Part:
    """One machine's share: number ``index`` (from 1) of ``count``."""

    index: int = 1
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def parse_part(text: str) -> Part:
    """A part as ``I/N``.

    Raises:
        ConfigError: it is not that.

    Example:
        >>> parse_part("2/3")
        Part(index=2, count=3)
    """
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    part = Part(*map(int, match.groups())) if match else Part(0, 0)
    if not 1 <= part.index <= part.count:
        raise ConfigError("this is not a part of the work", where="shard", expected="I/N with I from 1 to N", found=repr(text),
                          remedy="give 1/2 on one machine and 2/2 on another")
    return part


def share(found: Sequence[Job], part: Part) -> list[int]:
    """The numbers of the jobs that belong to a part.

    Machines never write into the same file, since a network's file system may cache pages of it: whole files are dealt out, those that one
    job writes together, the largest first, each to the machine that has least.
    """
    owner: dict[str, str] = {}

    def root(file: str) -> str:
        while owner.setdefault(file, file) != file:
            file = owner[file]
        return file

    for job in found:
        first, *others = sorted(job.files)
        for other in others:
            owner[root(other)] = root(first)
    sizes: dict[str, int] = {}
    for job in found:
        name = root(min(job.files))
        sizes[name] = sizes.get(name, 0) + job.nbytes
    loads, dealt = [0] * part.count, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        dealt[name] = loads.index(min(loads))
        loads[dealt[name]] += sizes[name]
    return [number for number, job in enumerate(found) if dealt[root(min(job.files))] == part.index - 1]
