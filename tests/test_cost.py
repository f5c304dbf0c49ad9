"""What a pack costs whoever reads it: time and memory in proportion to its size, whatever it holds; and no
check outlasts its budget.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
import tracemalloc
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from adapterpack import CPT, HRA, IA3, LoRA
from adapterpack.adapter_methods import Site, amount, complete, get, methods
from adapterpack.adapter_methods.core.config import by_suffix
from adapterpack.adapter_methods.core.orthogonal import nearest_divisor
from adapterpack.adapter_methods.core.torch_random import TorchGenerator
from adapterpack.adapter_methods.forms.prompt import PromptSite
from adapterpack.adapter_methods.peft.keys import default_and_pattern, literal
from adapterpack.errors import AdapterpackError, FormatError
from adapterpack.io import strict_json
from adapterpack.manifest import manifest as m
from adapterpack.pack.pack import build
from adapterpack.pack.validate import validation as validating
from adapterpack.pack.validate.checks.base import difference
from adapterpack.pack.validate.checks.context import Budget, Check, Spent, Subject
from adapterpack.pack.validate.checks.text import addresses
from adapterpack.pack.validate.checks.walk import walk
from adapterpack.pack.validate.registry import CHECKS
from adapterpack.pack.validate.validation import load, validate

sys.path.insert(0, str(Path(__file__).parent / "packs"))
import make_bad as bad

pytestmark = pytest.mark.fast


@contextmanager
def within(seconds: float, megabytes: float | None = None) -> Iterator[None]:
    """Fails if what stands inside takes more of the processor's time, or holds more memory at once."""
    if megabytes is not None:
        tracemalloc.start()
    start = time.process_time()
    try:
        yield
        taken, held = (
            time.process_time() - start,
            tracemalloc.get_traced_memory()[1] if megabytes is not None else 0,
        )
    finally:
        tracemalloc.stop()
    assert taken < seconds, f"{taken:.2f} s"
    assert megabytes is None or held < megabytes * 2**20, f"{held / 2**20:.1f} MB"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A valid pack that a test may spoil."""
    bad.good(tmp_path / "tickets")
    return tmp_path / "tickets"


# ------------------------------------------------------------------------------------------------------------
# hostile manifests

LABEL = {f"key {number}": number for number in range(20)}
HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "letters and dots": lambda v: v.update(extensions={"x_a": "a." * 14_000 + ":"}),
    "a long key with many values": lambda v: v.update(extensions={"x_a": {"k" * 400_000: [0] * 90_000}}),
    "a list of wrong things": lambda v: v.update(metrics=[1] * 100_000),
    "labels that are objects": lambda v: v["task"].update(labels=[LABEL] * 9_000),
    "a text that nests": lambda v: v.update(extensions={"x_a": "(" * 200_000}),
    "many bad addresses": lambda v: v.update(extensions={"x_a": "http://a " * 20_000}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_manifest_is_answered_in_time(name: str, folder: Path) -> None:
    """Validation and loading take seconds of the processor at most, though no deadline is near."""
    bad.edit(folder, HOSTILE[name])
    with within(10.0):
        report = validate(folder)
    assert len(report.findings) <= 1001
    with within(10.0):
        try:
            load(folder)
        except AdapterpackError:
            assert not report.valid


@pytest.mark.parametrize("part", ["{},", "[],", "0,", "{}:", '"a":0,'])
def test_json_of_very_many_parts_is_refused_before_it_is_read(part: str) -> None:
    """16 MB of nothing: no list is made of it. As many parts as files of adapters have are read."""
    data = ('{"a":[' + part * (16_000_000 // len(part)) + "0]}").encode()
    with within(10.0, 20), pytest.raises(FormatError, match="too many parts"):
        strict_json.loads(data, "x", 1 << 24)
    names = {
        f"base_model.model.layers.{number}.lora_A.weight": {
            "dtype": "F32",
            "shape": [8, 8],
            "data_offsets": [0, 256],
        }
        for number in range(50_000)
    }
    assert part != "{}," or strict_json.loads(json.dumps(names).encode(), "x", 1 << 24) == names


def test_a_place_is_written_out_where_it_is_wanted() -> None:
    """All places of a value under a key of a megabyte: no copy of the key for each. The pointer is that of
    RFC 6901.
    """
    value = {"k" * (1 << 20): [0] * 5_000, "a/b~c": {"d": [1]}}
    with within(10.0, 8):
        places = [place for place, _ in walk(value)]
    assert places[-1].pointer == "/a~1b~0c/d/0"
    assert len(places) == 5_005


def test_addresses_in_texts() -> None:
    """Those that stand in a text, however they are dressed; in time in proportion to it."""
    text = (
        "x http://a.b/c d, (ftp+x://y) data:text/html,z '//no' 1ssh://q :// \u00e9https://e <javascript:f()>"
    )
    assert list(addresses(text)) == [
        "http://a.b/c",
        "ftp+x://y)",
        "data:text/html,z",
        "ssh://q",
        "https://e",
        "javascript:f()",
    ]
    for attack in ("a." * 200_000, "a." * 100_000 + "://" * 100_000, "data:" * 100_000, "a://" * 100_000):
        with within(5.0):
            list(addresses(attack))


def test_templates_are_compared_in_time() -> None:
    """Two long templates that share lines in another order; and what is not compared is counted."""
    lines = [f"line {number % 500}" for number in range(20_000)]
    with within(10.0):
        said = difference("\n".join(lines), "\n".join(["first", *lines[::-1]]))
    assert said.startswith("--- base\n+++ pack")
    assert said.count("\n") == 40
    assert said.rpartition("... and ")[2] > "39"
    long = "\n".join(lines)
    assert "+last" in difference(long, f"{long}\nlast")


# ---------------------------------------------------------------------------------------------------------
# hyper-parameters of methods


def test_patterns_of_many_names_are_read_in_time() -> None:
    """Thousands of names against thousands of paths, where each was compared with each."""
    names = {f"layers.{number}.proj": number for number in range(5_000)}
    with within(10.0):
        assert len(literal(names, "rank_pattern")) == 5_000
        assert [by_suffix(names, f"model.{name}", None) for name in names] == list(names.values())
    deep = {".".join("ab" * 80) + f".{number}": number for number in range(2_000)}
    with within(20.0, 32):
        assert default_and_pattern(deep, anchored=True)[0] == 0
    cfg = IA3(feedforward=tuple(names))
    with within(10.0):
        assert all(cfg.at(f"model.{name}").feedforward for name in list(names)[:2_000])
    peft = get("ia3").peft
    assert peft is not None
    with within(10.0):
        written = peft.to_config(
            {**dict.fromkeys(names, IA3(feedforward=True)), **{f"x.{n}.y": IA3() for n in range(5_000)}}
        )
    assert written is not None
    assert written["feedforward_modules"] == list(names)
    clash = peft.to_config({"a.fc": IA3(feedforward=True), "b.a.fc": IA3()})
    assert clash is not None
    assert isinstance(clash["feedforward_modules"], str)
    with within(10.0):
        assert len(CPT(token_ids=(1,) * 8_000, token_types=tuple(range(4, 32_004, 4))).learnt) == 7_999


def test_divisors_are_found_in_time() -> None:
    """Of the largest prime below 2^24, and of a width with many divisors, as by trying each."""
    with within(0.2):
        assert nearest_divisor(16_777_213, 32) == 1
    for width in (1, 7, 36, 720, 4096):
        for wanted in (0, 1, 5, 30, 64, 10_000):
            parts = [part for part in range(1, width + 1) if width % part == 0]
            assert nearest_divisor(width, wanted) == min(parts, key=lambda part: (abs(part - wanted), part))


def largest(cfg: Any, name: str) -> Any:
    """The config with the largest whole number that it takes for a field, of those up to 2^60."""
    low, high = 1, 1 << 60
    while high - low > 1:
        middle = (low + high) // 2
        try:
            dataclasses.replace(cfg, **{name: middle})
            low = middle
        except (ValueError, TypeError, OverflowError):
            high = middle
    return dataclasses.replace(cfg, **{name: low})


WHOLE = [
    (name, field.name)
    for name, method in methods().items()
    for field in dataclasses.fields(method.config)
    if typing.get_type_hints(method.config)[field.name] in (int, int | None)
    and any(type(getattr(cfg, field.name)) is int for cfg in method.examples)
]


@pytest.mark.parametrize(("name", "field"), WHOLE)
def test_a_whole_number_of_a_config_has_a_bound(name: str, field: str) -> None:
    """The largest that is taken is less than 2^60; what a check asks of such a config (shapes, scale, amount)
    it is told at once.
    """
    method = get(name)
    for example in method.examples[:2]:
        if type(getattr(example, field)) is not int:
            continue
        try:
            cfg = largest(example, field)
        except ValueError:  # bound to another field
            continue
        assert getattr(cfg, field) < (1 << 60) - 1
        site = Site("layer", 16_777_213, 512, method.traits.layers[0])
        with within(5.0, 32):
            method.shapes(cfg, site)
            _ = cfg.scale, cfg.rank, amount(method, cfg, site)
            if method.storage.shared is not None:
                method.storage.shared.shapes(cfg, [site])


def test_random_numbers_are_drawn_in_little_more_memory_than_they_take() -> None:
    """Four million of each kind: 16 MB, and hardly anything on the way."""
    for draw in (
        lambda: TorchGenerator(1).uniform((1 << 22,), 0, 1),
        lambda: TorchGenerator(1).normal((1 << 22,), 1.0),
    ):
        with within(100, 40):
            draw()


SITES = ((1, 500), (500, 1), (30, 40))
RANKS = (
    "r",
    "u",
    "topk",
    "block_size",
    "mini_r",
    "k",
    "phm_dim",
    "num_tasks",
    "num_virtual_tokens",
    "theta_d_length",
    "vector_length",
)


def variants(method: Any) -> Iterator[Any]:
    """The examples of a method, and these with other numbers."""
    for example in method.examples:
        yield example
        for name in RANKS:
            for value in (8, 129):
                if type(getattr(example, name, None)) is int:
                    try:
                        yield dataclasses.replace(example, **{name: value})
                    except ValueError:
                        continue


def places(shape: tuple[int, ...], wide: int) -> np.ndarray:
    """Different places in a matrix of that width, where a shape is that of places; else zeros."""
    if len(shape) != 2 or shape[0] != 2:
        return np.zeros(shape, np.int32)
    return np.stack(np.divmod(np.arange(shape[1], dtype=np.int32), wide))


@pytest.mark.parametrize("name", list(methods()))
def test_a_method_makes_as_many_numbers_as_it_says(name: str) -> None:
    """Constants and normal form at wide, at tall and at square sites hold at most 64 bytes for each number
    that is stored, that the weight has, or that ``amount`` tells: this is what the bound on packs rests on.
    """
    method = get(name)
    rng = np.random.default_rng(0)
    for wide, tall in SITES:
        plain = Site("layer", wide, tall, method.traits.layers[0])
        if method.kind == "prompt":
            plain = PromptSite("@prompt", wide, 0, "prompt", layers=3, heads=2, head_dim=4)
        for variant in variants(method):
            (cfg,) = method.storage.resolve([variant], [plain]) if method.storage.resolve else [variant]
            shapes = {
                **method.shapes(cfg, plain),
                **(method.storage.shared.shapes(cfg, [plain]) if method.storage.shared else {}),
            }
            stored = sum(map(math.prod, shapes.values()))
            if stored > 1 << 20 or max(getattr(cfg, "token_indices", ()), default=0) >= tall:
                continue
            params = {
                key: places(shape, wide) if "indices" in key else rng.random(shape, np.float32) + 0.1
                for key, shape in shapes.items()
            }
            weight = rng.random((tall, wide), np.float32)
            site = dataclasses.replace(plain, weight=weight, base_bias=np.zeros(tall, np.float32))
            numbers = stored + wide * tall + amount(method, cfg, plain)
            try:
                # what is imported is imported
                method.normal_form(cfg, complete(method, cfg, params, site), site)
                with within(100, (64 * numbers + (1 << 18)) / 2**20):
                    method.normal_form(cfg, complete(method, cfg, params, site), site)
            except (np.linalg.LinAlgError, ValueError, IndexError):
                continue  # a site that the method cannot adapt


def test_a_pack_that_no_reader_would_take_is_not_built() -> None:
    """6000 reflections of two inputs: 36 million numbers of 12,000 stored ones; a thousand are fine."""
    for rank, refused in ((6_000, True), (1_000, False)):
        site = {Site("net.q", 2, 7): (HRA(r=rank), {"hra_u": np.ones((2, rank), np.float32)})}
        with pytest.raises(FormatError, match=r"far more numbers.*36000000") if refused else nullcontext():
            build("x", get("hra"), site, task=m.PackTask("text-generation"), base=m.Base())


# ------------------------------------------------------------------------------------------------------------
# budgets


class Counted(Budget):
    """A budget whose time runs out when it was looked at so many times."""

    left: int

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.__dict__["left"] = looks

    def require_time(self, what: str) -> None:
        self.__dict__["left"] -= 1
        if self.__dict__["left"] < 0:
            raise Spent(f"{what}: the time ran out")


STILL = {
    "follows": "only composed packs have nodes",
    "lineage": "bounded by the schema: 256 ancestors",
    "carried": "the pack has no template; see tests/test_templates.py",
    **dict.fromkeys(
        ("base_model", "tokenizer", "tied", "share", "quantization_trained_on"),
        "there is no base; its bytes are watched (tests/test_validator.py)",
    ),
}
"""Checks that go over nothing in a plain pack without a base."""


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """What the checks look at of a pack of 40 sites with a text in each."""
    folder = tmp_path_factory.mktemp("many") / "pack"
    factors = {"lora_A": np.ones((2, 5), np.float32), "lora_B": np.ones((7, 2), np.float32)}
    sites = {Site(f"net.{number}.q", 5, 7): (LoRA(r=2), factors) for number in range(40)}
    build("many", get("lora"), sites, task=m.PackTask("text-generation"), base=m.Base("org/base")).write(
        folder
    )
    seen: list[Subject] = []

    def taken(subject: Subject) -> tuple[list[Any], list[str]]:
        seen.append(subject)
        return [], []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validating, "run_checks", lambda subject, _: taken(subject))
        validate(folder, full=True)
    return seen[0]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_deadline_holds_inside_every_check(check: Check, subject: Subject) -> None:
    """A check that goes over sites, tensors or texts looks at the clock at each of them, and ends where the
    time does.
    """
    enough = Counted(1 << 20)
    assert not [finding for finding in check(subject._replace(budget=enough)) if finding.severity == "error"]
    looks = (1 << 20) - enough.left
    assert (looks < 40) == (check.__name__ in STILL), looks
    if looks:
        with pytest.raises(Spent, match="the time ran out"):
            list(check(subject._replace(budget=Counted(looks // 2))))


@pytest.mark.parametrize(("check", "needs"), [("fused", 10), ("second_reader", 5_000), ("roles", 10)])
def test_the_memory_holds_inside_a_check(check: str, needs: int, subject: Subject) -> None:
    """A check that copies tensors asks before it does; with all that the files take and no more, it is not
    made.
    """
    (made,) = [one for one in CHECKS if one.__name__ == check]
    files = sum(map(len, subject.file_bytes.values()))
    quantized = {name: replace(entry, scales="x") for name, entry in subject.pack.manifest.tensors.items()}
    int8 = dataclasses.replace(subject.pack, manifest=replace(subject.pack.manifest, tensors=quantized))
    tight = subject._replace(
        pack=subject.pack if check == "second_reader" else int8, budget=Budget(memory=files + needs)
    )
    with pytest.raises(Spent, match="bytes are more than"):
        list(made(tight))
    list(made(subject._replace(budget=Budget(memory=files + 100 * needs))))


def test_a_deadline_ends_a_validation_wherever_it_is(folder: Path) -> None:
    """Whenever the time runs out, the report says so, and never that the pack is valid; and nothing is
    loaded.
    """
    enough = Counted(1 << 20)
    assert validate(folder, budget=enough).state == "valid"
    looks = (1 << 20) - enough.left
    for left in (0, 1, 2, looks // 3, looks // 2, looks - 1):
        report = validate(folder, budget=Counted(left))
        assert report.state == "not fully checked", left
        assert "the time ran out" in report.not_checked[0]
