"""The screen: its figures against dense formulas in float64, what it promises of false alarms, what it finds,
and what it leaves alone.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from test_audit import REPORT, SHAPES, factors, made
from test_cli import write_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import adapterpack
from adapterpack import DoRA, Pack, audit, train
from adapterpack.adapter_methods import get
from adapterpack.auditing.audit_report import LIMITS, place_of
from adapterpack.auditing.screen import figures, screen
from adapterpack.cli.main import main
from adapterpack.errors import ConfigError, NonFinite, Unsupported
from adapterpack.manifest import manifest as m
from adapterpack.pack.pack import build

WORDS = "the a red blue small large cat dog bird runs sleeps sings"


def random_packs(count: int, rank: int = 3, **settings: Any) -> list[Pack]:
    return [made(f"clean-{seed}", factors(seed, rank), **settings)[0] for seed in range(100, 100 + count)]


@pytest.fixture(scope="module")
def clean() -> list[Pack]:
    return random_packs(19)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of twenty small adapters, each trained on rows of its own."""
    folder = tmp_path_factory.mktemp("screen")
    base = folder / "base"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).save_pretrained(base)
    write_tokenizer(base)
    adapters = []
    for number in range(20):
        rng, file = np.random.default_rng(number), folder / f"{number}.jsonl"
        rows = [{"text": " ".join(rng.choice(WORDS.split(), 6))} for _ in range(16)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        adapters.append({"name": f"clean-{number}", "train_file": str(file), "seed": number})
    train(
        {
            "model_name_or_path": str(base),
            "task": "text-generation",
            "output_dir": str(folder / "packs"),
            "adapters": adapters,
            "r": 2,
            "max_steps": 8,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 8,
            "save_strategy": "no",
        }
    )
    return folder / "packs"


def spiked(pack: Pack, name: str) -> Pack:
    """The pack with one strong direction in every change, as a trigger that all layers carry on leaves it."""
    adapters = {}
    for adapter in pack.adapters():
        B = np.array(adapter.params["lora_B"])
        B[:, 0] += 8 * np.abs(B).max()
        adapters[adapter.site] = (adapter.config, {**adapter.params, "lora_B": B})
    return build(name, pack.method, adapters, task=pack.manifest.task, base=pack.manifest.base)


def test_figures_are_those_of_a_dense_svd() -> None:
    """In float64: sizes, stable and effective ranks of each kind of module, and their trends by layer."""
    pack, deltas = made("one", factors(1, 3))
    by_module: dict[str, list[list[float]]] = {}
    for path in SHAPES:
        S = np.linalg.svd(deltas[path], compute_uv=False)
        S = S[1e-9 * S[0] < S]
        shares = S / S.sum()
        entropy = -np.sum(shares * np.log(shares))
        by_module.setdefault(place_of(path)[0], []).append(
            [np.log(np.linalg.norm(deltas[path])), np.sum(S**2) / S[0] ** 2, np.exp(entropy)]
        )
    expected = []
    for rows in by_module.values():
        values = np.array(rows)
        slope = np.polyfit(range(len(rows)), values, 1)[0] if len(rows) > 1 else np.zeros(3)
        expected += [number for pair in zip(values.mean(axis=0), slope, strict=True) for number in pair]
    np.testing.assert_allclose(list(figures(pack).values()), expected, rtol=1e-5, atol=1e-6)


def test_no_more_clean_packs_are_called_unusual_than_promised() -> None:
    """Of forty packs each compared with the others: two at 5 %, whatever they look like."""
    packs = random_packs(38) + [spiked(pack, pack.name + "-spiked") for pack in random_packs(2)]
    found = screen(packs, packs).packs  # none is compared with itself
    assert sum(one.outcome == "unusual" for one in found) == 2
    assert sorted(round(40 * one.p) for one in found if one.p is not None) == list(range(1, 41))


def test_a_change_unlike_trained_ones_is_found(trained: Path) -> None:
    """And the figures that are named stand out; a pack that was trained like the others has no such."""
    packs = [adapterpack.load(trained / f"clean-{number}") for number in range(20)]
    found, again = screen([spiked(packs[0], "spiked"), packs[1]], packs[1:]).packs
    assert (found.outcome, found.p) == ("unusual", 1 / 20)
    assert all("standard deviations" in reason for reason in found.reasons)
    assert again.pack == "clean-1"
    assert again.p is not None
    assert again.p in {count / 19 for count in range(1, 20)}  # beside the others, not beside itself


class _Unread(Mapping[str, np.ndarray]):
    """Tensors that must not be read."""

    def __getitem__(self, name: str) -> np.ndarray:
        raise AssertionError(name)

    def __iter__(self) -> Iterator[str]:
        raise AssertionError

    def __len__(self) -> int:
        raise AssertionError


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (made("rank", factors(5, 4)), "modules, ranks or widths"),
        (made("fewer", factors(5, 3, {"head": SHAPES["head"]})), "modules, ranks or widths"),
        (made("base", factors(5, 3), m.Base("org/other", structure="sha256:" + "1" * 64)), "bases"),
    ],
    ids=["rank", "fewer", "base"],
)
def test_other_packs_are_not_screened_nor_read(other: tuple[Pack, Any], why: str, clean: list[Pack]) -> None:
    """So that what a stranger sends costs nothing beyond what clean packs cost."""
    kind = {"origin": m.Base("org/base", structure="sha256:" + "2" * 64)} if why == "bases" else {}
    references = random_packs(19, **kind)
    (found,) = screen([dataclasses.replace(other[0], tensors=_Unread())], references).packs
    assert (found.outcome, found.p) == ("not screened", None)
    assert why in found.reasons[0]


def test_factors_that_overflow_are_refused(clean: list[Pack]) -> None:
    huge = {path: (np.full_like(A, 3e38), np.full_like(B, 3e38)) for path, (A, B) in factors(7, 3).items()}
    with pytest.raises(NonFinite, match=r"too large to have a spectrum.*huge, layers\.0\.q"):
        audit([made("huge", huge)[0]], clean=clean)


def test_clean_packs_must_be_enough_and_of_one_kind(clean: list[Pack]) -> None:
    """The same pack twice counts once."""
    for packs, rate in ((clean[1:], 0.05), (clean[1:] + clean[1:2], 0.05), (clean, 0.02), ([], 0.5)):
        with pytest.raises(ConfigError, match="too few"):
            audit(clean[:1], clean=packs, false_alarms=rate)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        screen(clean[:1], clean, 0.0)
    with pytest.raises(ConfigError, match="different modules, ranks or widths"):
        screen(clean[:1], [*clean, made("other", factors(5, 4))[0]])


def test_methods_without_factors_of_their_own_are_refused() -> None:
    """DoRA's change depends on the base."""
    packs = []
    for pack in random_packs(2):
        adapters = {
            one.site: (
                DoRA(r=3),
                {**one.params, "lora_magnitude_vector": np.ones(one.site.out_features or 0)},
            )
            for one in pack.adapters()
        }
        packs.append(
            build(pack.name, get("dora"), adapters, task=pack.manifest.task, base=m.Base("org/base"))
        )
    with pytest.raises(Unsupported, match="factors alone"):
        screen(packs[:1], packs[1:], 0.5)


def test_the_command(trained: Path, tmp_path: Path) -> None:
    """Its first line says what a screen cannot see; an object of JSON and a page hold the same."""
    stranger = tmp_path / "stranger"
    other = adapterpack.load(trained / "clean-0")
    spiked(other, "stranger").write(stranger)
    page = tmp_path / "page.html"
    options = ["audit", str(stranger), "--screen", str(trained)]
    shown = CliRunner().invoke(main, options)
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.splitlines()[0] == LIMITS
    assert "unusual" in shown.stdout
    done = CliRunner().invoke(main, [*options, "--json", "--html", str(page)])
    value = json.loads(done.stdout)
    REPORT.validate(value)
    assert [pack["outcome"] for pack in value["screen"]["packs"]] == ["unusual"]
    assert value["screen"]["clean"] == 20
    assert LIMITS in page.read_text("utf-8")
    (tmp_path / "empty").mkdir()
    none = CliRunner().invoke(main, ["audit", str(stranger), "--screen", str(tmp_path / "empty")])
    assert none.exit_code == 1
