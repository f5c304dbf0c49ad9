"""Attacks by packs."""

from __future__ import annotations

from attack import Attacks


def test_a_folder_without_anything(attacks: Attacks) -> None:
    attacks.command("validate", attacks.work).refused("not a pack")


def test_help(attacks: Attacks) -> None:
    attacks.command("--help").harmless("merge")
