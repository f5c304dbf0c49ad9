"""Attacks by a hub, and by hosts that it points to, on its clients: the token, paths, and answers of other
types.
"""

from __future__ import annotations

from typing import Any

import pytest
from attack import SECRET, Attacks
from attacking_hub import COMMIT, MIB, PACK, Host, Request, entry, impatient, pull

# --- the token ----------------------------------------------------------------------------------------------

ELSEWHERE = {
    "another port": "http://127.0.0.1:{other}/x",
    "another name": "http://localhost:{hub}/x",
    "another name and port": "http://localhost:{other}/x",
    "a name before": "http://127.0.0.1:{hub}@127.0.0.1:{other}/x",
    "a password": "http://me:pw@127.0.0.1:{other}/x",
    "digits": "http://2130706433:{hub}/x",
    "hexadecimal": "http://0x7f000001:{hub}/x",
    "fewer digits": "http://127.1:{hub}/x",
    "version six": "http://[::ffff:127.0.0.1]:{hub}/x",
    "a dot at the end": "http://localhost.:{hub}/x",
    "no scheme": "//127.0.0.1:{other}/x",
    "a backslash": "http://127.0.0.1:{other}\\@127.0.0.1:{hub}/x",
    "a fragment": "http://127.0.0.1:{other}/#@127.0.0.1:{hub}",
    "a file": "file:///etc/passwd",
    "data": "data:application/json,[]",
    "no port": "http://127.0.0.1:0/x",
    "a port that is none": "http://127.0.0.1:x/y",
    "brackets": "http://[::1/x",
    "a space": "http://127.0.0.1 :{other}/x",
    "a tab": "ht\ttp://127.0.0.1:{other}/x",
    "nothing": "http://",
    "letters of other scripts": "http://\u3002\uff11\uff12\uff17.0.0.1:{other}/x",
}


@pytest.mark.parametrize("way", ["listing", "redirect"])
@pytest.mark.parametrize("kind", ELSEWHERE)
def test_the_token_goes_to_the_hub_alone(
    way: str, kind: str, hub: Host, other: Host, attacks: Attacks
) -> None:
    """Where a listing goes on, and where the bytes of a file lie: other spellings of hosts are other
    hosts.
    """
    where = ELSEWHERE[kind].format(hub=hub.port, other=other.port).encode().decode("latin-1")
    hub.answers["/x"] = lambda request: request.say([])
    if way == "listing":
        hub.answers["/tree/"] = lambda request: request.say([entry("a.json")], Link=f'<{where}>; rel="next"')
    else:
        hub.answers["/resolve/"] = lambda request: request.say({}, 302, Location=where, X_Repo_Commit=COMMIT)
    pull(attacks, hub).refused(absent=attacks.work / "out")
    assert [token for _, token in other.seen if token] == []
    # which the client takes for the end of a user's name, so that the hub itself is meant
    if kind != "a backslash":
        assert [path for path, token in hub.seen if path.endswith("/x") and token] == []


ECHOES = {
    "an error": lambda request, token: request.say({"error": token}, 400, X_Error_Message=token),
    "a commit": lambda request, token: request.say({"sha": token, "id": "org/name"}),
    "a name": lambda request, token: request.say({"sha": COMMIT, "id": f"org/{token[7:]}"}),
    "no JSON": lambda request, token: request.say(data=token.encode()),
    "an encoding": lambda request, token: request.say({}, Content_Encoding=token[7:]),
    "a redirect": lambda request, token: request.say(
        {}, 302, Location=f"http://{token[7:].replace('_', '-')}/"
    ),
    "an address": lambda request, token: request.say({}, 302, Location=f"ftp://{token[7:]}/x"),
}


@pytest.mark.parametrize("kind", ECHOES)
@pytest.mark.parametrize("where", ["/revision/", "/tree/", "/resolve/"])
def test_a_hub_that_repeats_the_token(kind: str, where: str, hub: Host, attacks: Attacks) -> None:
    hub.answers[where] = lambda request: ECHOES[kind](request, request.headers["Authorization"])
    outcome = pull(attacks, hub).refused(absent=attacks.work / "out")
    assert SECRET[7:] not in outcome.err + outcome.out


@pytest.mark.parametrize("header", ["X_Repo_Commit", "Content_Range", "X_Linked_Etag", "X_Xet_Hash"])
def test_a_header_that_repeats_the_token(header: str, hub: Host, attacks: Attacks) -> None:
    hub.answers["/resolve/"] = lambda request: request.say(
        data=PACK, status=206, **{"X_Repo_Commit": COMMIT, header: request.headers["Authorization"]}
    )
    pull(attacks, hub).refused(absent=attacks.work / "out")


def test_a_listing_that_repeats_the_token(hub: Host, attacks: Attacks) -> None:
    hub.answers["/tree/"] = lambda request: request.say([entry(f"a/{request.headers['Authorization']}/../b")])
    pull(attacks, hub).refused(absent=attacks.work / "out")


# --- names and types ----------------------------------------------------------------------------------------

PATHS = [
    "..",
    "../x",
    "a/../../x",
    "/etc/x",
    "//x",
    "C:/x",
    "c:x",
    "a\\b",
    "\\\\host\\x",
    "a\x00b",
    "a\x1b[2Jb",
    "a\nb",
    "con",
    "nul.txt",
    "AUX",
    "com1.json",
    "a/lpt1",
    "a.",
    "a ",
    "a /b",
    "a//b",
    "a/./b",
    "",
    ".",
    "~\u202etxt.exe",
    "a\u200bb",
    "x" * 256,
    "e\u0301",
    "\ud800",
    "ADAPTERPACK.json",
    "adapterpack.json/x",
    "a\x7fb",
    "a\u2028b",
    "x/" * 200 + "y",
]


@pytest.mark.parametrize("path", PATHS, ids=ascii)
def test_a_path_that_must_not_become_a_file(path: str, hub: Host, attacks: Attacks) -> None:
    hub.answers["/tree/"] = lambda request: request.say([entry("adapterpack.json", PACK), entry(path)])
    pull(attacks, hub).refused("hub lists", absent=attacks.work / "out")


ODD = {
    "a number": 7,
    "a large number": 2**70,
    "a fraction": 1e400,
    "a list": [[]],
    "text": "\x1b[2J\u202e",
    "nothing": None,
    "an object": {"a": {}},
    "yes": True,
    "half a character": "\ud800",
    "long text": "x" * MIB,
}
FIELDS = ["sha", "id", "entries", "entry", "path", "size", "oid", "lfs.oid", "lfs.size", "type"]


def shaped(name: str, field: str, value: Any) -> tuple[Any, Any]:
    """The commit and the listing of a hub where one field is something else."""
    commit: Any = {"sha": COMMIT, "id": f"org/{name}"}
    one: dict[str, Any] = entry("adapterpack.json", PACK) | {"lfs": {"oid": "0" * 64, "size": len(PACK)}}
    listing: Any = [one]
    if field in commit:
        commit[field] = value
    elif field == "entries":
        listing = value
    elif field == "entry":
        listing = [value]
    elif field.startswith("lfs."):
        one["lfs"][field[4:]] = value
    else:
        one[field] = value
    return commit, listing


def impatient_each(address: str, count: int) -> int:
    """A pull of name0, name1, ...: 1 if each was refused."""
    codes = []
    for number in range(count):
        try:
            codes.append(impatient(address, "pull", f"hf://org/name{number}", "-o", f"out{number}"))
        except SystemExit as end:
            codes.append(end.code)
    return 1 if codes == [1] * count else 9


@pytest.mark.parametrize("kind", ODD)
def test_answers_of_other_types(kind: str, hub: Host, attacks: Attacks) -> None:
    """In every field of the commit and the listing."""

    def answer(request: Request) -> None:
        name = request.path.split("/")[4]
        commit, listing = shaped(name, FIELDS[int(name.removeprefix("name"))], ODD[kind])
        request.say(commit if "/revision/" in request.path else listing)

    hub.answers = {"/revision/": answer, "/tree/": answer}
    attacks.call(impatient_each, hub.address, len(FIELDS)).refused()
    assert not [*attacks.work.glob("out*")]
