"""Checks the strings in the manifest: addresses, repository names, and characters that change what people
see. AP801-AP804.
"""

from __future__ import annotations

import ipaddress
import re
import string
from collections.abc import Iterator
from urllib.parse import urlsplit

from .context import Subject
from .finding import CheckRule, Finding, check_rule, read_table
from .walk import texts_in, walk

URL = check_rule("AP801")
LOOKALIKE = check_rule("AP802")
REPO = check_rule("AP803")
BIDI = check_rule("AP804")

OWNERS: tuple[str, ...] = tuple(read_table("known_names")["owners"])
_FOLD = str.maketrans({"0": "o", "1": "l", "i": "l", "5": "s", "_": "-", ".": "-"})
_SCHEME = frozenset(string.ascii_letters + string.digits + "+.-")
_BEGINS = re.compile(r"://|\b(?:javascript|data|file|vbscript):(?=[^\s<>\"'])", re.IGNORECASE)
_ENDS = re.compile(r"[\s<>\"']")
_TEXTS = "the texts of the manifest"
_HIDING = re.compile("[\u202a-\u202e\u2066-\u2069\u200b\u2060\ufeff]")


def texts(s: Subject) -> Iterator[Finding]:
    """AP801 and AP804 for every string and key of the manifest, AP802-AP803 for repository names."""
    manifest = s.manifest
    whole = s.manifest.to_json()
    # Each distinct string is checked once; places are only searched for the faulty ones.
    faulty = {text for text in s.budget.over(texts_in(whole), _TEXTS) if any(_faults(text))}
    for place, value in s.budget.over(walk(whole), _TEXTS) if faulty else ():
        for text in (place.key, value):
            for rule, message in _faults(text) if isinstance(text, str) and text in faulty else ():
                yield rule.at(f"manifest#{place.pointer}", message, pointer=place.pointer)
    if manifest.license_link and not manifest.license_link.startswith("https://"):
        yield URL.at("license_link", "an address that is not https", pointer="/license_link")
    parents = manifest.lineage.parents if manifest.lineage else ()
    repos = [
        ("/base/name", manifest.base.name),
        *((f"/lineage/parents/{at}/repo", parent.repo) for at, parent in enumerate(parents)),
    ]
    for pointer, name in repos:
        if name is None:
            continue
        parts = name.split("/")
        if len(parts) > 2 or any(part in {"", ".", ".."} or part.endswith(".git") for part in parts):
            yield REPO.at(name, "this is no name of a repository", pointer=pointer)
        elif len(parts) == 2 and (owner := looks_like(parts[0])):
            yield LOOKALIKE.at(name, f"the owner '{parts[0]}' looks like '{owner}'", pointer=pointer)


def _faults(text: str) -> Iterator[tuple[CheckRule, str]]:
    """Yields what is wrong with one string."""
    if _HIDING.search(text):
        yield BIDI, "the text holds invisible or reversing characters"
    for address in addresses(text) if ":" in text else ():
        if problem := unsafe(address):
            yield URL, f"an address that {problem}"


def addresses(text: str) -> Iterator[str]:
    """Yields the addresses in a text, each up to a blank, a quote or a bracket, in linear time.

    Example:
        >>> list(addresses("see (https://example.org/x) or javascript:alert(1), a.b.c"))
        ['https://example.org/x)', 'javascript:alert(1),']
    """
    end = 0
    for scheme in _BEGINS.finditer(text):
        start = scheme.start()
        if start < end:
            continue
        if scheme.group() == "://":
            while start > end and text[start - 1] in _SCHEME:
                start -= 1
            while start < scheme.start() and not text[start].isalpha():
                start += 1
            if start == scheme.start():
                continue
        stop = _ENDS.search(text, scheme.end())
        end = len(text) if stop is None else stop.start()
        yield text[start:end]


def unsafe(address: str) -> str | None:
    """Returns what is wrong with an address, or None; the address is never opened.

    Example:
        >>> unsafe("https://example.org/x"), unsafe("http://example.org"), unsafe("https://127.1/")
        (None, 'is not https', 'is of a private or local host')
    """
    try:
        parts = urlsplit(address)
        host = (parts.hostname or "").rstrip(".")
        port = parts.port
    except ValueError:
        return "cannot be read"
    if parts.scheme.lower() != "https":
        return "is not https"
    if "@" in parts.netloc or "\\" in address:
        return "holds a user name or a password"
    if port not in (None, 443):
        return "has an unusual port"
    if not host.isascii():
        return "has a host with look-alike letters"
    return "is of a private or local host" if _local(host) else None


def _local(host: str) -> bool:
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        last = host.rpartition(".")[2]
        number = re.fullmatch(r"[0-9]+|0x[0-9a-f]*", last)  # a shorthand of an IPv4 address, such as 127.1
        return (
            "." not in host
            or number is not None
            or last in {"local", "localhost", "internal", "lan", "home", "arpa"}
        )


def looks_like(owner: str) -> str | None:
    """Returns the well-known owner that ``owner`` could be mistaken for, or None.

    Example:
        >>> looks_like("meta-1lama"), looks_like("meta-llama"), looks_like("acme")
        ('meta-llama', None, None)
    """
    if owner in OWNERS:
        return None
    folded = owner.casefold().translate(_FOLD).replace("rn", "m")
    for well_known in OWNERS:
        target = well_known.casefold().translate(_FOLD).replace("rn", "m")
        if folded == target or (len(target) >= 5 and _one_apart(folded, target)):
            return well_known
    return None


def _one_apart(first: str, second: str) -> bool:
    """Whether one insertion, deletion, substitution or swap of neighbouring letters turns one text into the
    other.
    """
    if abs(len(first) - len(second)) > 1:
        return False
    start = 0
    while start < min(len(first), len(second)) and first[start] == second[start]:
        start += 1
    a, b = first[start:], second[start:]
    swapped = len(a) == len(b) >= 2 and a[:2] == b[1::-1] and a[2:] == b[2:]
    return a[1:] == b[1:] or a[1:] == b or a == b[1:] or swapped
