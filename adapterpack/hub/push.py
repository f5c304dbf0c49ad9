"""From this machine to a hub: one commit on the head that was seen, and a second look at what arrived."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..errors import ConfigError, FormatError, HubConflict, RepoNotFound, RevisionNotFound, storage_errors
from ..pack import manifest as m
from ..pack.pack import MUTABLE, SIGNATURE, Pack
from . import names
from .artifact import KINDS, open_remote
from .client import Listed, Remote, again, api, connect, endpoint, fetch, hub_errors, tree
from .prepare import README, Prepared, prepared

_PUBLIC = "huggingface.co"
_MAX_CARD = 4 << 20
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Pushed:
    """What a push did, or with ``dry_run`` would do: ``sent`` and ``deleted`` name files, ``commit`` is where the artifact is now.

    ``id`` is the digest of its manifest. ``pull_request`` is an address.
    """

    repo: str
    commit: str | None
    kind: str
    id: str
    sent: tuple[str, ...]
    deleted: tuple[str, ...] = ()
    created: bool = False
    pull_request: str | None = None
    tag: str | None = None
    dry_run: bool = False

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        return dict(m.plain(self))


def push(pack: Pack | str | os.PathLike[str], target: str, *, pr: bool = False, tag: str | None = None, private: bool = False,
         dry_run: bool = False, base_model: str | None = None, license: str | None = None, message: str | None = None,
         token: str | None = None) -> Pushed:
    """Publishes a pack or a bundle in a repository of a hub as one commit, after checking it, and reads back what arrived.

    Equal content is left alone. ``pr`` opens a pull request; ``tag`` names the commit; ``private`` is for a repository that is made anew.
    ``base_model`` (OWNER/NAME) and ``license`` say what a pack does not; such a pack has another id.

    Raises:
        ConfigError: no usable name of the base, no license, a secret, or files in the repository that belong to something else.
        FormatError: the artifact is not valid, or what arrived is not what was sent.
        HubConflict: somebody else changed the repository meanwhile.
        HubError: the hub refuses.

    Example:
        >>> push("packs/tickets", "hf://org/tickets", license="apache-2.0").commit  # doctest: +SKIP
        '4c1f...'
    """
    reference = names.parse(target)
    if tag is not None and (pr or not names.is_revision(tag) or names.COMMIT.fullmatch(tag)):
        raise ConfigError("this cannot be a tag", where="tag", found=tag,
                          remedy="a pull request has none; else use letters, digits and . _ -")
    with prepared(pack, reference.repo, base_model, license) as ours:
        return _Push(reference, ours, token).run(pr=pr, tag=tag, private=private, dry_run=dry_run, message=message)


class _Push:
    """One push: what is there, what is missing, the commit, the proof."""

    def __init__(self, reference: names.Reference, ours: Prepared, token: str | None) -> None:
        self.reference, self.ours, self.token = reference, ours, token
        self.digests = {name: _digests(path) for name, path in ours.files.items()}
        self.digests[README] = _digests(ours.card)

    def run(self, *, pr: bool, tag: str | None, private: bool, dry_run: bool, message: str | None) -> Pushed:
        """Goes through with it."""
        remote, created = self._remote(private, pr, dry_run)
        there = {} if remote is None else tree(remote)
        send = [name for name in sorted(self.digests) if not self._equal(name, there.get(name))]
        if README in send and remote is not None and README in there and not self._is_ours(remote, there[README]):
            send.remove(README)
        delete = [] if remote is None else self._stale(remote, there)
        head = None if remote is None else remote.commit
        result = Pushed(self.reference.repo, head, self.ours.kind, self.ours.id, tuple(send), tuple(delete), created, None, None, dry_run)
        if tag is not None and remote is not None:
            self._require_free(tag, remote.commit, bool(send or delete))
        if dry_run or remote is None:
            return result
        if not send and not delete:  # equal content
            return dataclasses.replace(result, tag=self._tagged(tag, remote.commit))
        info = self._commit(remote, send, delete, pr, message)
        self._prove(dataclasses.replace(remote, commit=info.oid), kept=README in there and README not in send)
        return dataclasses.replace(result, commit=info.oid, pull_request=info.pr_url, tag=self._tagged(tag, info.oid))

    def _remote(self, private: bool, pr: bool, dry_run: bool) -> tuple[Remote | None, bool]:
        """The head of the branch, and whether the repository had to be made."""
        try:
            return connect(self.reference, self.token), False
        except RepoNotFound:
            if pr:
                raise
            if dry_run:
                return None, True
        with hub_errors(self.reference):
            again(lambda: api(self.token).create_repo(self.reference.repo, private=private, exist_ok=False))
        return connect(names.Reference(self.reference.repo), self.token), True

    def _equal(self, name: str, listed: Listed | None) -> bool:
        size, sha256, git = self.digests[name]
        return listed is not None and listed.size == size and (listed.sha256 == sha256 if listed.sha256 else listed.git == git)

    def _is_ours(self, remote: Remote, card: Listed) -> bool:
        from .card import MARK  # noqa: PLC0415

        if card.size > _MAX_CARD:
            return False
        with tempfile.TemporaryDirectory() as scratch:
            fetch(remote, card, Path(scratch) / README)
            return MARK.encode() in (Path(scratch) / README).read_bytes()

    def _stale(self, remote: Remote, there: Mapping[str, Listed]) -> list[str]:
        """Files of what was there before; anything else that lies in the repository stops the push."""
        extra = sorted(there.keys() - self.digests.keys() - (MUTABLE - {SIGNATURE}))
        if not extra:
            return []
        before: set[str] = {SIGNATURE}
        if mark := next((name for name in KINDS if name in there), None):
            with tempfile.TemporaryDirectory() as scratch:
                try:
                    found = open_remote(remote, there, Path(scratch))
                    before |= {mark, *(entry.path for entry in found.files)}
                except FormatError:
                    before |= {mark}  # a broken one: only what it surely was is replaced
        if strange := [name for name in extra if name not in before]:
            raise ConfigError("the repository holds files that are not of a pack or a bundle", where=remote, found=", ".join(strange[:5]),
                              remedy="push to another repository, or remove them there first")
        return extra

    def _commit(self, remote: Remote, send: list[str], delete: list[str], pr: bool, message: str | None) -> Any:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete  # noqa: PLC0415

        if names.COMMIT.fullmatch(remote.revision):
            raise ConfigError("a push goes to a branch", where=self.reference, remedy="name a branch, or none")
        # The client sends open files as large files of git; paths would go to a service that only the public hub has.
        elsewhere = urlsplit(endpoint()).hostname != _PUBLIC
        with ExitStack() as opened, hub_errors(self.reference), _without_remarks():
            operations: list[Any] = [CommitOperationDelete(name) for name in delete]
            for name in send:
                file = self.ours.files.get(name)
                content = self.ours.card if file is None else opened.enter_context(file.open("rb")) if elsewhere else file
                operations.append(CommitOperationAdd(name, content))
            return api(self.token).create_commit(
                self.reference.repo, operations, revision=remote.revision, create_pr=pr or None, parent_commit=remote.commit,
                commit_message=message or f"{self.ours.kind} {self.ours.label}", commit_description=self.ours.id)

    def _prove(self, remote: Remote, kept: bool) -> None:
        """What the hub lists now is what was sent, and nothing else."""
        there = tree(remote)
        wrong = [name for name in self.digests if not (kept and name == README) and not self._equal(name, there.get(name))]
        wrong += sorted(there.keys() - self.digests.keys() - MUTABLE)
        if wrong:
            raise FormatError("what arrived at the hub is not what was sent", where=remote, found=", ".join(wrong[:5]),
                              remedy="push again; do not use that commit")

    def _require_free(self, tag: str, head: str, changes: bool) -> None:
        """A tag that is there may only be met again by a push that changes nothing."""
        try:
            found = connect(names.Reference(self.reference.repo, tag), self.token).commit
        except RevisionNotFound:
            return
        if changes or found != head:
            raise HubConflict("the tag is taken, and tags do not move", where=f"{self.reference.repo}@{tag}", found=found,
                              remedy="choose another tag; nothing was sent")

    def _tagged(self, tag: str | None, commit: str) -> str | None:
        """Sets the tag; one that is there already must be on this very commit, for a tag never moves."""
        if tag is None:
            return None
        try:
            found = connect(names.Reference(self.reference.repo, tag), self.token).commit
        except RevisionNotFound:
            with hub_errors(self.reference):
                again(lambda: api(self.token).create_tag(self.reference.repo, tag=tag, revision=commit))
            return tag
        if found != commit:
            raise HubConflict("the tag is on another commit, and tags do not move", where=f"{self.reference.repo}@{tag}", expected=commit,
                              found=found, remedy="choose another tag; the commit itself is there")
        return tag


@contextmanager
def _without_remarks() -> Iterator[None]:
    """The client warns of the way that it is deliberately made to take."""
    log = logging.getLogger("huggingface_hub._commit_api")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _digests(content: Path | bytes) -> tuple[int, str, str]:
    """Size, sha256 and git's blob id."""
    if isinstance(content, bytes):
        git = hashlib.sha1(b"blob %d\x00" % len(content) + content, usedforsecurity=False)
        return len(content), hashlib.sha256(content).hexdigest(), git.hexdigest()
    with storage_errors(content), content.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\x00" % size, usedforsecurity=False)
        while chunk := file.read(_CHUNK):
            sha256.update(chunk)
            git.update(chunk)
    return size, sha256.hexdigest(), git.hexdigest()
