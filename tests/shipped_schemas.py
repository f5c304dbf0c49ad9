"""The schemas that the package ships, checked by the library of that name and not by the package's own
reader.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import re2
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

_CHECKED = set[tuple[str, object]]()


@cache
def _validator(name: str) -> Draft202012Validator:
    file, _, part = name.partition("#")
    schema = json.loads((Path(__file__).parents[1] / "schemas" / f"{file}.json").read_text("utf-8"))
    return Draft202012Validator({"$defs": schema["$defs"], "$ref": f"#/$defs/{part}"} if part else schema)


def fits(value: Any, name: str) -> bool:
    """Whether a JSON value fits the schema of that name, such as ``report.v1``, or a part of one, such as
    ``report.v1#run_row``.
    """
    return bool(_validator(name).is_valid(value))


def unlike(schema: Any) -> list[str]:
    """The patterns in a schema that not every reader takes for the same. RE2 has what ECMAScript, Python and
    Rust have in common: no look-around, no end of a text but ``$``, no escape of Unicode. A pattern is looked
    for anywhere, so that each has both ends.
    """
    if isinstance(schema, list):
        return [pattern for item in schema for pattern in unlike(item)]
    if not isinstance(schema, dict):
        return []
    pattern = schema.get("pattern")
    own = [pattern] if isinstance(pattern, str) and not _alike(pattern) else []
    return own + unlike(list(schema.values()))


def _alike(pattern: str) -> bool:
    with suppress(re2.error):
        re2.compile(pattern)
        return pattern[:1] + pattern[-1:] == "^$"
    return False


def structure(value: Any) -> object:
    """Which fields and kinds of values there are, whatever the values are."""
    if isinstance(value, dict):
        return frozenset((key, structure(item)) for key, item in value.items())
    return frozenset(map(structure, value)) if isinstance(value, list) else type(value)


def _require(value: Any, name: str) -> None:
    """Checks a value against a schema, unless one of its structure was: what values there may be is up to
    readers, and their tests.
    """
    key = name, structure(value)
    if key not in _CHECKED:
        error = best_match(_validator(name).iter_errors(value))
        assert error is None, (
            f"what was written does not fit {name}, at {error.json_path}: {error.message:.500}"
        )
        _CHECKED.add(key)


@contextmanager
def held() -> Iterator[None]:
    """Holds every pack, bundle and fleet that this process writes to its schema; every report of a command
    and every row's answer, too.
    """
    from adapterpack.bundle import manifest as bundle
    from adapterpack.cli import output
    from adapterpack.fleet import fleet
    from adapterpack.manifest import manifest as pack
    from adapterpack.manifest.migrations import STEPS
    from adapterpack.pack.pack import Pack
    from adapterpack.runtime.sessions.run import RowRunner

    write_pack, write_bundle, write_fleet, finite = (
        Pack.write_into,
        bundle.Bundle.write,
        fleet.Fleet.write,
        output.finite,
    )
    outcomes = RowRunner.outcomes

    @functools.wraps(write_pack)
    def pack_into(self: Pack, folder: Path) -> None:
        write_pack(self, folder)
        # a copy of a later version has what only that knows
        if self.manifest.format_version in {*STEPS, pack.FORMAT_VERSION}:
            _require(json.loads((folder / pack.FILE_NAME).read_bytes()), "manifest.v1")

    def bundle_into(self: bundle.Bundle, folder: Path, *args: Any, **options: Any) -> None:
        write_bundle(self, folder, *args, **options)
        _require(json.loads((folder / bundle.FILE_NAME).read_bytes()), "bundle.v1")

    @functools.wraps(write_fleet)
    def fleet_to(self: fleet.Fleet, out: Any) -> Any:
        written = write_fleet(self, out)
        _require(json.loads((Path(out) / fleet.FILE_NAME).read_bytes()), "fleet.v1")
        return written

    def printed(value: Any) -> Any:
        plain = json.loads(json.dumps(finite(value)))
        if "command" in plain:  # the answer to a request of a batch has OpenAI's form without --json
            _require(plain, "report.v1")
        return plain

    def answered(self: RowRunner, rows: Any) -> Any:
        for outcome in outcomes(self, rows):
            if outcome.result is not None:
                _require(
                    {**json.loads(json.dumps(finite(outcome.result), default=str)), "command": "run"},
                    "report.v1#run_row",
                )
            yield outcome

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RowRunner, "outcomes", answered)
        patch.setattr(Pack, "write_into", pack_into)
        patch.setattr(bundle.Bundle, "write", bundle_into)
        patch.setattr(fleet.Fleet, "write", fleet_to)
        patch.setattr(output, "finite", printed)
        yield
