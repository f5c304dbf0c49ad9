"""Writes and reads the leaves of a base's ``content`` fingerprint, with which single tensors can be verified
without reading the others.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import BaseMismatch, FormatError, SiteNotFound, nearest
from ..io import strict_json
from . import fingerprint as fp

FILE_NAME = "base.leaves.json"
FORMAT = "adapterpack-leaves"
MAX_BYTES = 32 << 20


def encode(leaves: Mapping[str, str]) -> bytes:
    """Returns the side file, the root and every leaf, in canonical bytes."""
    return strict_json.canonical({"format": FORMAT, "content": fp.root(leaves), "leaves": dict(leaves)})


def decode(data: bytes, where: object) -> tuple[str, dict[str, str]]:
    """Returns the root and the leaves of a side file.

    Raises:
        FormatError: the file is malformed, or its leaves do not match its root.

    Example:
        >>> leaves = {"w": fp.leaf("w", "U8", (3,), bytes(32))}
        >>> decode(encode(leaves), "the side file") == (fp.root(leaves), leaves)
        True
    """
    value = strict_json.loads(data, where, MAX_BYTES)
    if (
        not isinstance(value, dict)
        or set(value) != {"format", "content", "leaves"}
        or value["format"] != FORMAT
    ):
        raise FormatError(
            "this is not a file of leaves", where=where, expected=f"format '{FORMAT}', content, leaves"
        )
    leaves = value["leaves"]
    if not isinstance(leaves, dict) or not all(isinstance(leaf, str) for leaf in leaves.values()):
        raise FormatError("leaves must map tensor names to digests", where=where)
    if (root := fp.root(leaves)) != value["content"]:
        raise FormatError(
            "the leaves do not give the root that the file states",
            where=where,
            expected=str(value["content"])[:80],
            found=root,
            remedy="write the side file again from the base",
        )
    return root, leaves


def verify_tensor(content: str, leaves: Mapping[str, str], header: fp.Header, sha256: bytes) -> None:
    """Raises unless a tensor, given by header and sha256, belongs to the base with the fingerprint
    ``content``.

    Raises:
        BaseMismatch: the leaves do not match ``content``, or the tensor has another leaf.
        SiteNotFound: that base has no tensor of this name.
        FormatError: a leaf is malformed.

    Example:
        >>> digest = bytes(32)
        >>> leaves = {"w": fp.leaf("w", "U8", (3,), digest)}
        >>> verify_tensor(fp.root(leaves), leaves, ("w", "U8", (3,)), digest)
    """
    if (root := fp.root(leaves)) != content:
        raise BaseMismatch(
            "these leaves belong to another base",
            expected=content,
            found=root,
            remedy="use the leaves that were written for the base that the pack names",
        )
    name = header[0]
    if name not in leaves:
        raise SiteNotFound(
            "the base that the pack names has no such tensor", found=name, remedy=nearest(name, leaves)
        )
    if (actual := fp.leaf(*header, sha256)) != leaves[name]:
        raise BaseMismatch(
            "this tensor is not the one of the base that the pack names",
            where=f"tensor {name}",
            expected=leaves[name][:16],
            found=actual[:16],
            remedy="use the base that the pack names",
        )
