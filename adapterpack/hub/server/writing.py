"""Handlers of the hub's write requests: repositories, commits, tags, branches. All need a token that may
write.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from msgspec.structs import replace
from starlette.responses import JSONResponse, Response

from ...errors import ConfigError
from ...http import HTTPError, bad_request
from ...io import Json, plain_yaml
from ..transport import MAX_LISTED, names
from . import trees
from .access import NAME
from .requests import HubRequest, parse_json
from .storage import HubStorage, Settings
from .trees import Entry

Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
_LARGE = frozenset({".safetensors", ".onnx", ".onnx_adapter", ".data", ".bin", ".model", ".gguf"})
_MAX_REGULAR = 10 << 20
_MAX_GRANTED = 1000
_LONGEST_HEADER = 256 << 10


class NewRepo(msgspec.Struct):
    """The repository to create: its name, and its owner, by default the account's name."""

    name: str
    organization: str | None = None
    type: Any = None
    visibility: Any = None
    private: Any = None


class Readme(msgspec.Struct):
    """The text of a README."""

    content: str = ""


class AnnouncedFile(msgspec.Struct):
    """A file of the next commit: its path, its size, and its first bytes."""

    path: str
    size: int
    sample: bytes = b""


class Announcement(msgspec.Struct):
    """The files of the next commit."""

    files: list[AnnouncedFile]


class Summary(msgspec.Struct, rename="camel"):
    """The message and description of a commit, and its parent commit."""

    summary: str = ""
    description: str = ""
    parent_commit: str | None = None


class Header(msgspec.Struct, tag="header", tag_field="key"):
    """The first line of a commit."""

    value: Summary


class ChangedFile(msgspec.Struct):
    """A file or folder by its path, with its bytes (JSON has them as base64) or the ``oid`` of an upload."""

    path: str
    content: bytes = b""
    oid: Sha256 | None = None


class Operation(msgspec.Struct):
    """A further line of a commit."""

    key: Literal["file", "lfsFile", "deletedFile", "deletedFolder"]
    value: ChangedFile

    def step(self, storage: HubStorage) -> trees.Step:
        """Stores the bytes of a new file, and returns the step of the commit."""
        if self.key.startswith("deleted"):
            return self.value.path.rstrip("/"), None
        path = _safe_path(self.value.path)
        if self.key == "file":
            return path, storage.keep_bytes(self.value.content)
        if self.value.oid is None:
            raise bad_request("a large file is named by its sha256")
        return path, storage.large(self.value.oid)


class NewTag(msgspec.Struct):
    """The name of a tag."""

    tag: str


class NewBranch(msgspec.Struct, rename="camel"):
    """The revision at which a branch begins."""

    starting_point: str | None = None


def create(asked: HubRequest) -> Response:
    """Creates a repository. If it exists already, the error contains its URL."""
    new = asked.json(NewRepo)
    repo = f"{asked.author if new.organization is None else new.organization}/{new.name}"
    address = {"url": f"{asked.origin}/{repo}", "id": repo}
    if new.type not in {None, "model"}:
        raise bad_request("This hub keeps models only")
    private = new.visibility == "private" or new.private is True
    try:
        asked.storage.create(repo, private=private, author=asked.author)
    except HTTPError as refused:
        if refused.status == 409:
            refused.more = address
        raise
    return JSONResponse(address)


def settings(asked: HubRequest) -> Response:
    """Sets who may see a repository (``visibility``), and whether reading its files needs a grant
    (``gated``).
    """
    value = asked.json(dict[str, Any])
    changes = {}
    if "gated" in value:
        changes["gated"] = value["gated"]
    if "visibility" in value or "private" in value:
        changes["private"] = value.get("visibility") == "private" or value.get("private") is True
    if changes.get("gated", False) not in ("auto", "manual", False) or not changes:
        raise bad_request("gated is auto, manual or false; visibility is public or private")
    asked.storage.set(asked.repo, lambda before: replace(before, **changes))
    return JSONResponse(changes)


def grant(asked: HubRequest) -> Response:
    """Grants a user access to the files of a gated repository."""
    user = asked.json(Json).get("user")
    if not isinstance(user, str) or not NAME.fullmatch(user):
        raise bad_request("user is a name")

    def change(before: Settings) -> Settings:
        granted = {*before.granted, user}
        if len(granted) > _MAX_GRANTED:
            raise HTTPError(413, "TooLarge", f"A repository is granted to {_MAX_GRANTED} users at most")
        return replace(before, granted=tuple(sorted(granted)))

    asked.storage.set(asked.repo, change)
    return JSONResponse({})


def validate_yaml(asked: HubRequest) -> Response:
    """Checks that the header of a README is a YAML mapping."""
    text = asked.json(Readme).content
    message = header_problem(text[4:].partition("\n---")[0]) if text.startswith("---\n") else None
    return JSONResponse(
        {"errors": [{"message": message}] if message else [], "warnings": []}, 400 if message else 200
    )


def preupload(asked: HubRequest) -> Response:
    """Tells how to send each file: in the commit, or separately as a large file. Files that exist come with
    their id.
    """
    storage = asked.storage
    present = storage.commit(asked.repo, storage.resolve(asked.repo, asked.revision)).files
    answer = []
    for file in asked.json(Announcement).files:
        suffix = f".{_safe_path(file.path).rpartition('.')[2].lower()}"
        entry = present.get(file.path)
        large = file.size > _MAX_REGULAR or b"\0" in file.sample or suffix in _LARGE
        mode = {"path": file.path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        answer.append(mode if entry is None else {**mode, "oid": entry.sha256 if entry.lfs else entry.git})
    return JSONResponse({"files": answer})


def commit(asked: HubRequest) -> Response:
    """Makes one commit from lines of JSON; with ``create_pr=1`` on a new pull request."""
    if asked.body.count(b"\n") > MAX_LISTED + 1:
        raise HTTPError(413, "TooLarge", f"A commit has at most {MAX_LISTED} operations")
    first, *lines = [line for line in asked.body.split(b"\n") if line.strip()] or [b"{}"]
    header = parse_json(first, Header).value
    operations = [parse_json(line, Operation) for line in lines]

    def change(files: dict[str, Entry]) -> None:
        trees.change(files, [operation.step(asked.storage) for operation in operations])
        if clash := names.clash(files):
            raise bad_request(
                f"Two paths that are one file on some systems: {clash[0][:80]!r} and {clash[1][:80]!r}"
            )

    oid, number = asked.storage.change(
        asked.repo,
        asked.revision,
        asked.author,
        header.summary,
        header.description,
        parent=header.parent_commit,
        change=change,
        as_pr=asked.request.query_params.get("create_pr") == "1",
    )
    place = f"{asked.origin}/{asked.repo}"
    answer = {
        "success": True,
        "commitOid": oid,
        "commitUrl": f"{place}/commit/{oid}",
        "hookOutput": "",
    }
    return JSONResponse(
        answer if number is None else {**answer, "pullRequestUrl": f"{place}/discussions/{number}"}
    )


def tag(asked: HubRequest) -> Response:
    """Creates a tag on a revision."""
    asked.storage.add_ref(asked.repo, "tags", asked.json(NewTag).tag, asked.revision)
    return Response()


def branch(asked: HubRequest) -> Response:
    """Creates a branch, by default from the main branch."""
    start = asked.json(NewBranch).starting_point or names.MAIN
    asked.storage.add_ref(asked.repo, "heads", asked.revision, start)
    return Response()


def drop_tag(asked: HubRequest) -> Response:
    """Removes a tag."""
    asked.storage.drop_tag(asked.repo, asked.revision)
    return Response()


def _safe_path(path: str) -> str:
    """Returns a path that a repository can keep.

    Raises:
        HTTPError: the path is not valid on every system.
    """
    if reason := names.unsafe(path):
        raise bad_request(f"A path that cannot be kept: {reason}")
    return path


def header_problem(text: str) -> str | None:
    """Returns what is wrong with the YAML header of a README, or None for a mapping, in linear time.

    Example:
        >>> header_problem("license: mit"), header_problem("- mit")
        (None, 'the header is no mapping')
    """
    if len(text) > _LONGEST_HEADER:
        return f"the header is longer than {_LONGEST_HEADER} characters"
    try:
        value = plain_yaml.loads(text, None, what="the header is not YAML")
    except ConfigError as error:
        return error.what
    return None if isinstance(value, dict) else "the header is no mapping"
