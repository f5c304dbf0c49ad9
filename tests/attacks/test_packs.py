"""Attacks by packs of a forger who knows the format; ``tests/packs/make_bad.py`` has more of them, for every
rule of the validator.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from attack import Attacks

sys.path.insert(0, str(Path(__file__).parent.parent / "packs"))
import make_bad as bad

CASES = {case.name: case for case in bad.BAD}
FORGED = (
    "a_terabyte_of_holes",
    "bytes_after_the_last_tensor",
    "config_names_a_class_to_import",
    "config_names_a_module_to_import",
    "config_with_a_regular_expression_that_never_ends",
    "digest_of_another_tensor",
    "empty_shape_that_overflows",
    "header_length_beyond_the_file",
    "header_nested_like_a_bomb",
    "layer_that_is_larger_than_any",
    "link_out_of_the_folder",
    "manifest_key_twice",
    "manifest_of_brackets",
    "many_empty_tensors",
    "member_of_an_unknown_method",
    "not_a_number",
    "overlapping_tensors",
    "pipe_for_tensors",
    "seed_that_stands_for_a_great_matrix",
    "shape_of_ten_thousand_axes",
    "shape_that_overflows",
    "smuggled_tensor",
    "tensor_name_with_nul",
    "zip_archive",
    "zip_for_tensors",
)


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_pack_is_not_valid(attacks: Attacks, name: str) -> None:
    bad.make(CASES[name], attacks.work / "pack")
    attacks.command("validate", "pack").refused(CASES[name].rule)


@pytest.mark.parametrize("name", FORGED[::2])
@pytest.mark.parametrize(
    "command",
    [("resize", "pack", "--rank", "1", "-o", "out"), ("convert", "pack", "--to", "gguf", "-o", "out.gguf")],
)
def test_nothing_is_made_of_it(attacks: Attacks, name: str, command: tuple[str, ...]) -> None:
    bad.make(CASES[name], attacks.work / "pack")
    attacks.command(*command).refused(absent=attacks.work / command[-1])


MANIFESTS: dict[str, Any] = {
    "5 MB of brackets": b"[" * (5 << 20),
    "zeros": b"\0" * 1000,
    "UTF-16": "{}".encode("utf-16"),
    "half a surrogate pair": b'{"a": "\\ud800"}',
    "a number of 5,000 digits": b'{"a": ' + b"9" * 5_000 + b"}",
    "a newer format": b'{"format": "adapterpack", "format_version": "99.0"}\n',
    "200 MB": b"{" + b" " * (200 << 20) + b"}",
    "a list": b"[]\n",
    "nothing": b"",
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest(attacks: Attacks, name: str) -> None:
    bad.good(attacks.work / "pack")
    (attacks.work / "pack" / "adapterpack.json").write_bytes(MANIFESTS[name])
    attacks.command("inspect", "pack").refused("error", "adapterpack.json")


def test_a_folder_that_is_a_link_to_itself(attacks: Attacks) -> None:
    (attacks.work / "pack").symlink_to("pack")
    attacks.command("validate", "pack").refused("pack")


def test_a_pack_inside_a_pack(attacks: Attacks) -> None:
    bad.good(attacks.work / "pack")
    shutil.copytree(attacks.work / "pack", attacks.work / "inner")
    shutil.move(attacks.work / "inner", attacks.work / "pack" / "inner")
    attacks.command("validate", "pack").refused("regular files")
