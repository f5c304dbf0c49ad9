"""Pushes an artifact to a hub: makes one commit on the head that was read, and compares the result with what
was sent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from ..errors import ConfigError, FormatError, HubConflict, RepoNotFound, RevisionNotFound
from ..io import Json, Progress, scratch_folder, strict_json
from ..pack import MUTABLE, SIGNATURE, Pack
from ..paths import StrPath
from .artifact import CLOSED, KINDS, open_remote
from .card import MARK
from .prepare import README, PreparedPush, prepare
from .push_to_registry import push_to_registry
from .transport import (
    Draft,
    Endpoint,
    ListedFile,
    NewCommit,
    RegistryReference,
    Remote,
    connect,
    endpoint,
    fetch,
    hub_errors,
    in_folder,
    names,
    parse_address,
    post_json,
    tree,
    with_retries,
)
from .transport.commit import commit

_MAX_CARD = 4 << 20


@dataclass(frozen=True)
class Pushed:
    """The result of a push, or of a ``dry_run``: ``sent`` and ``deleted`` name files of the repository, and
    ``commit`` holds the artifact now.

    ``folder`` is its folder in the repository, "" for the complete repository; ``id`` is the digest of its
    manifest; ``pull_request`` is a URL.
    """

    repo: str
    folder: str
    commit: str | None
    kind: str
    id: str
    sent: tuple[str, ...]
    deleted: tuple[str, ...] = ()
    created: bool = False
    pull_request: str | None = None
    tag: str | None = None
    dry_run: bool = False

    def to_json(self) -> Json:
        """Returns the result as JSON values."""
        return dict(strict_json.plain(self))


def push(
    pack: Pack | StrPath,
    target: str,
    *,
    pr: bool = False,
    tag: str | None = None,
    private: bool = False,
    dry_run: bool = False,
    base_model: str | None = None,
    license: str | None = None,
    message: str | None = None,
    token: str | None = None,
    progress: Progress | None = None,
) -> Pushed:
    """Checks a pack or a bundle, pushes it to a hub or a registry, and verifies what arrived.

    In a registry of containers (``oci://HOST/NAME:TAG``) the signature and a bill of materials are attached
    to the artifact. On a hub a push is one commit; the target may be a folder in the repository, and files
    outside of it stay. Files with equal content are not sent again. ``pr`` opens a pull request; ``tag``
    names the commit; ``private`` applies if the repository is created. ``base_model`` (OWNER/NAME) and
    ``license`` supply what a pack does not say; such a pack gets another id. Large files are sent in parts
    if the hub supports it, so an interrupted push resumes with the missing part. ``progress`` is called with
    (bytes done, bytes in all).

    Raises:
        ConfigError: the base has no usable name, there is no license, a text contains a secret, or the
            repository has files of something else.
        FormatError: the artifact is not valid, or what arrived is not what was sent.
        HubConflict: someone else changed the repository meanwhile.
        HubError: the hub refuses.

    Example:
        >>> push("packs/tickets", "hf://org/tickets", license="apache-2.0").commit  # doctest: +SKIP
        '4c1f...'
    """
    reference = parse_address(target)
    if tag is not None and (pr or not names.is_revision(tag) or names.COMMIT.fullmatch(tag)):
        raise ConfigError(
            "this cannot be a tag",
            where="tag",
            found=tag,
            remedy="a pull request has none; else use letters, digits and . _ -",
        )
    if isinstance(reference, RegistryReference) and (pr or tag or private or message):
        raise ConfigError(
            "a registry has neither pull requests nor messages, and the address names the tag",
            where=reference,
            remedy="leave --pr, --private, --message and --tag out: oci://HOST/NAME:TAG",
        )
    show = progress or (lambda done, total: None)
    with prepare(pack, reference, base_model, license) as ours:
        if isinstance(reference, RegistryReference):
            digest, sent = push_to_registry(ours, reference, dry_run, show)
            repo, revision = reference.repo, reference.revision
            return Pushed(repo, "", digest, ours.kind, ours.id, sent, tag=revision, dry_run=dry_run)
        push = _Push(reference, ours, token, show)
        return push.run(pr=pr, tag=tag, private=private, dry_run=dry_run, message=message)


class _Push:
    """The steps of one push: reads the repository, finds what is missing, commits, and verifies."""

    def __init__(
        self,
        reference: names.HubReference,
        ours: PreparedPush,
        token: str | None,
        progress: Progress,
    ) -> None:
        self.reference = reference
        self.ours = ours
        self.token = token
        self.progress = progress
        self.files = {**ours.files, README: ours.card}

    def run(self, *, pr: bool, tag: str | None, private: bool, dry_run: bool, message: str | None) -> Pushed:
        """Executes the push."""
        remote, created = self._remote(private, pr, dry_run)
        whole = {} if remote is None else tree(remote.whole_repo)
        there = in_folder(whole, self.reference.prefix)
        if strange := next((path for path in self._enclosing() if path in whole), None):
            raise ConfigError(
                "the folder lies in that of another artifact, whose list of files is closed",
                where=self.reference,
                found=strange,
                remedy="push to a folder outside of it, or to another repository",
            )
        send = [name for name in sorted(self.files) if not self._equal(name, there.get(name))]
        if (
            README in send
            and remote is not None
            and README in there
            and not self._is_ours(remote, there[README])
        ):
            send.remove(README)
        delete = [] if remote is None else self._stale(remote, there)
        head = None if remote is None else remote.commit
        result = Pushed(
            self.reference.repo,
            self.reference.folder,
            head,
            self.ours.kind,
            self.ours.id,
            self._full(send),
            self._full(delete),
            created,
            dry_run=dry_run,
        )
        if tag is not None and remote is not None:
            self._require_free(tag, remote.commit, bool(send or delete))
        if dry_run or remote is None:
            return result
        if not send and not delete:  # equal content
            return dataclasses.replace(result, tag=self._set_tag(tag, remote.commit))
        made = self._commit(remote, send, delete, pr, message)
        self._verify(
            dataclasses.replace(remote, commit=made.oid), whole, kept=README in there and README not in send
        )
        return dataclasses.replace(
            result, commit=made.oid, pull_request=made.pull_request, tag=self._set_tag(tag, made.oid)
        )

    def _remote(self, private: bool, pr: bool, dry_run: bool) -> tuple[Remote | None, bool]:
        """Returns the head of the branch, and whether the repository had to be created."""
        try:
            return connect(self.reference, self.token), False
        except RepoNotFound:
            if pr:
                raise
            if dry_run:
                return None, True
        owner, _, name = self.reference.repo.partition("/")
        self._post(
            "repos/create",
            {"organization": owner, "name": name, "visibility": "private" if private else "public"},
        )
        return connect(self.reference.at(names.MAIN), self.token), True

    def _full(self, files: list[str]) -> tuple[str, ...]:
        return tuple(f"{self.reference.prefix}{name}" for name in files)

    def _enclosing(self) -> Iterator[str]:
        """Returns the paths that would mark an artifact in a folder above."""
        parents = PurePosixPath(self.reference.folder).parents if self.reference.folder else ()
        return ((parent / mark).as_posix() for parent in parents for mark in CLOSED)

    def _equal(self, name: str, listed: ListedFile | None) -> bool:
        ours = self.files[name]
        if listed is None or listed.size != ours.size:
            return False
        return listed.sha256 == ours.sha256 if listed.sha256 else listed.git == ours.git

    def _is_ours(self, remote: Remote, card: ListedFile) -> bool:
        if card.size > _MAX_CARD:
            return False
        with scratch_folder() as scratch:
            fetch(remote, card, scratch / README)
            return MARK.encode() in (scratch / README).read_bytes()

    def _stale(self, remote: Remote, there: Mapping[str, ListedFile]) -> list[str]:
        """Returns files of the previous artifact that must go. Any other file in the repository stops the
        push.
        """
        extra = sorted(there.keys() - self.files.keys() - (MUTABLE - {SIGNATURE}))
        if not extra:
            return []
        before = {SIGNATURE}
        if mark := next((name for name in KINDS if name in there), None):
            with scratch_folder() as scratch:
                try:
                    before |= {mark, *(entry.path for entry in open_remote(remote, there, scratch).files)}
                except FormatError:
                    before |= {mark}  # a broken artifact: replaces only what certainly belongs to it
        if strange := [name for name in extra if name not in before]:
            raise ConfigError(
                "the repository holds files that are not of a pack or a bundle",
                where=remote,
                found=", ".join(strange[:5]),
                remedy="push to another repository, or remove them there first",
            )
        return extra

    def _commit(
        self, remote: Remote, send: list[str], delete: list[str], pr: bool, message: str | None
    ) -> NewCommit:
        if names.COMMIT.fullmatch(remote.reference.revision):
            raise ConfigError(
                "a push goes to a branch", where=self.reference, remedy="name a branch, or none"
            )
        draft = Draft(
            {remote.path(name): self.files[name] for name in send},
            list(map(remote.path, delete)),
            message or f"{self.ours.kind} {self.ours.label}",
            self.ours.id,
            pr,
        )
        return commit(remote, draft, self.progress)

    def _post(self, path: str, value: Json) -> None:
        hub = Endpoint(endpoint(), self.token)
        with hub_errors(self.reference):
            with_retries(lambda: post_json(f"{hub.url}/api/{path}", hub, self.reference, value))

    def _verify(self, remote: Remote, before: Mapping[str, ListedFile], kept: bool) -> None:
        """Checks that the hub now lists exactly what was sent, and that files outside of the folder are as
        ``before``.
        """
        whole = tree(remote.whole_repo)
        prefix = self.reference.prefix
        there = in_folder(whole, prefix)
        wrong = [
            name
            for name in self.files
            if not (kept and name == README) and not self._equal(name, there.get(name))
        ]
        wrong += sorted(there.keys() - self.files.keys() - MUTABLE)
        outside = [path for path in before.keys() | whole.keys() if not path.startswith(prefix)]
        wrong += sorted(path for path in outside if whole.get(path) != before.get(path))
        if wrong:
            raise FormatError(
                "what arrived at the hub is not what was sent",
                where=remote,
                found=", ".join(wrong[:5]),
                remedy="push again; do not use that commit",
            )

    def _find_tag(self, tag: str) -> str | None:
        """Returns the commit that a tag is on, or None if the repository has no such tag."""
        try:
            return connect(names.HubReference(self.reference.repo, tag), self.token).commit
        except RevisionNotFound:
            return None

    def _require_free(self, tag: str, head: str, changes: bool) -> None:
        """Checks that a tag is new, or that the push changes nothing and the tag is on the head."""
        tagged = self._find_tag(tag)
        if tagged is not None and (changes or tagged != head):
            raise HubConflict(
                "the tag is taken, and tags do not move",
                where=f"{self.reference.repo}@{tag}",
                found=tagged,
                remedy="choose another tag; nothing was sent",
            )

    def _set_tag(self, tag: str | None, oid: str) -> str | None:
        """Sets the tag. An existing tag must already be on this commit, since tags never move."""
        if tag is None:
            return None
        tagged = self._find_tag(tag)
        if tagged is None:
            self._post(f"models/{self.reference.repo}/tag/{oid}", {"tag": tag})
        elif tagged != oid:
            raise HubConflict(
                "the tag is on another commit, and tags do not move",
                where=f"{self.reference.repo}@{tag}",
                expected=oid,
                found=tagged,
                remedy="choose another tag; the commit itself is there",
            )
        return tag
