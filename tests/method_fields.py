"""Prints each field of ``Method`` and of its groups with the methods that set it: a field that few set is a hook
that costs every reader more than it gives.

Run it with ``python tests/method_fields.py``; ``--few 2`` prints the fields with at most two users.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

from adapterpack.adapter_methods import METHODS, Method, PeftForm, PeftLayer, Storage, Training, Traits

GROUPS: tuple[type[Any], ...] = (Method, Traits, Training, Storage, PeftForm, PeftLayer)


def read_defaults(group: type[Any]) -> dict[str, Any]:
    """Each field of a group with its default, which is the group itself where there is none."""
    if not dataclasses.is_dataclass(group):
        return {name: group._field_defaults.get(name, group) for name in group._fields}
    return {
        field.name: group if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(group)
    }


def walk_groups(value: Any) -> Iterator[Any]:
    """The groups that a method consists of, the method itself among them."""
    if isinstance(value, GROUPS):
        yield value
        for name in read_defaults(type(value)):
            field = getattr(value, name)
            for part in field.values() if isinstance(field, dict) else (field,):
                yield from walk_groups(part)


def count_users() -> dict[str, list[str]]:
    """``Group.field`` -> the built-in methods that set it to something other than its default."""
    users: dict[str, list[str]] = {
        f"{group.__name__}.{name}": [] for group in GROUPS for name in read_defaults(group)
    }
    for method in METHODS.values():
        for group in walk_groups(method):
            for name, default in read_defaults(type(group)).items():
                field = users[f"{type(group).__name__}.{name}"]
                value = getattr(group, name)
                if (value is not default and value != default) and method.name not in field:
                    field.append(method.name)
    return users


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--few", type=int, default=1 << 30, help="only fields with at most so many users")
    few = parser.parse_args().few
    users = count_users()
    for field, names in sorted(users.items(), key=lambda item: len(item[1])):
        if len(names) <= few:
            sys.stdout.write(f"{len(names):3} {field:32} {' '.join(names)}\n")
    rare = sum(len(names) < 3 for names in users.values())
    sys.stdout.write(f"{len(users)} fields, {rare} with fewer than three users\n")
