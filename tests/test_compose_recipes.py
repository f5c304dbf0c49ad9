"""What surrounds a composition: recipes, plans, budgets, policies for modules trained whole, statistics, and
the search for weights.
"""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from rule_laws import Ours, close, deltas, made, measured

import adapterpack
from adapterpack import LoRA, attach, compose, load
from adapterpack.adapter_methods import Site
from adapterpack.adapter_methods.lora import lora
from adapterpack.cli.commands.compose import command
from adapterpack.cli.main import main
from adapterpack.composing.mergekit import MERGEKIT_METHODS, to_mergekit
from adapterpack.composing.plan import plan
from adapterpack.composing.recipe import CompositionRecipe, read, recipe_of
from adapterpack.composing.rules.lorahub import search_weights
from adapterpack.composing.rules.rule import RULES, rules
from adapterpack.composing.statistics import Statistics
from adapterpack.composing.statistics import read as read_statistics
from adapterpack.errors import AdapterpackError, ConfigError, FormatError, NothingToDo, Unsupported
from adapterpack.manifest import manifest as m
from adapterpack.pack.pack import Pack, build
from adapterpack.pack.validate.validation import validate
from adapterpack.tasks.task import get_task
from adapterpack.torch_adapters.models.load import load_model

fast = pytest.mark.fast
BASE = m.Base("org/base")


# Recipes.


@pytest.mark.sampled(3)
@fast
@pytest.mark.parametrize("rule", rules())
def test_a_recipe_makes_the_same_bytes(rule: str, tmp_path: Path) -> None:
    """Of every rule: the pack is made again from its recipe and from its folder, the packs given the other
    way round, byte for byte.
    """
    ours = Ours(rule)
    packs = [made(seed).write(tmp_path / f"p{seed}") for seed in range(1, 1 + len(ours.weights))]
    options: dict[str, Any] = {"rank": 6} if ours.rule.cut else {}
    kind = ours.rule.statistics
    for pack in packs if kind else []:
        measured(pack, kind).write(tmp_path / f"{pack.name}.{kind}")
    files = [tmp_path / f"{pack.name}.{kind}" for pack in packs] if kind else None
    with pytest.warns() if rule.startswith("peft") else _quiet():
        compose(packs, rule=rule, weights=ours.weights, statistics=files, out=tmp_path / "both", **options)
        recipe_of(load(tmp_path / "both")).write(tmp_path / "both.json")
        again = list(reversed([load(pack.path or "") for pack in packs]))
        turned = None if files is None else files[::-1]
        compose(again, recipe=tmp_path / "both.json", statistics=turned, out=tmp_path / "again")
        assert compose(again, recipe=tmp_path / "both", statistics=turned).id == load(tmp_path / "both").id
    one, two = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("both", "again")
    )
    assert one.keys() == two.keys()
    if files is None:
        assert load(tmp_path / "again").renamed("both").id == load(tmp_path / "both").id
    assert one["adapter_model.safetensors"] == two["adapter_model.safetensors"]


def _quiet() -> Any:
    import contextlib

    return contextlib.nullcontext()


@fast
def test_a_recipe_knows_packs_by_their_digests(tmp_path: Path) -> None:
    """Another pack of the same name, one too many and one too few are refused; a result that is another is
    told; a tree is repeated too.
    """
    one, two = made(1), made(2)
    pack = compose([one, two], rule="ties", weights=[0.4, 0.6], params={"density": 0.5}, rank=4, name="both")
    recipe = recipe_of(pack)
    assert compose([two, one], recipe=recipe).id == pack.id
    assert (
        CompositionRecipe(**vars(recipe)) == recipe
        and json.loads(json.dumps(recipe.to_json()))["parents"][0]["digest"] == one.id
    )
    for packs in ([one], [one, made(2, factor=2.0)], [one, two, made(3)]):
        with pytest.raises(FormatError, match="recipe") as raised:
            compose(packs, recipe=recipe)
        assert "sha256:" in str(raised.value) or "bfp" in str(raised.value) or ":" in str(raised.value)
    with pytest.raises(FormatError, match="another result"):
        compose([one, two], recipe=CompositionRecipe(**{**vars(recipe), "options": {"rank": 3}}))
    with pytest.raises(ConfigError, match="recipe says itself"):
        compose([one, two], recipe=recipe, rank=3)
    with pytest.raises(ConfigError, match="was not composed"):
        recipe_of(one)
    parts = [one.renamed("a"), two.renamed("b")]
    routed = compose(parts, tree="arrow(a, b, top_k=1)", name="routed")
    recipe_of(routed).write(tmp_path / "routed.json")
    assert compose(parts[::-1], recipe=tmp_path / "routed.json").id == routed.id


@fast
@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"format": "adapterpack-recipe-1"}',
        '{"format": "adapterpack-recipe-1", "name": "x", "rule": "linear", "parents": []}',
        '{"format": "adapterpack-recipe-1", "name": "x", "rule": 3, "parents": [{"digest": "d", "name": '
        '"n"}]}',
        '{"format": "adapterpack-recipe-1", "name": "x", "rule": "linear", "code": "x", "parents": [1]}',
    ],
)
def test_a_file_that_is_no_recipe_is_a_named_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(FormatError):
        read(tmp_path / "r.json")


@fast
def test_mergekit_gets_what_it_has_the_formula_of(tmp_path: Path) -> None:
    """Written where the formula is the same; refused by name and with the reason where it is not: negative
    weights, scopes, chance.
    """
    packs = [made(1), made(2)]

    def of(rule: str, weights: list[float], **params: Any) -> dict[str, Any]:
        pack = compose(packs, rule=rule, weights=weights, params=params, rank=6 if RULES[rule].cut else None)
        return to_mergekit(recipe_of(pack), "org/base", ["one", "two"])

    found = of("ties", [0.4, 0.6], density=0.5, scope="tensor", lam=0.8)
    assert found == {
        "merge_method": "ties",
        "base_model": "org/base",
        "dtype": "float32",
        "models": [
            {"model": "org/base+one", "parameters": {"weight": 0.4, "density": 0.5}},
            {"model": "org/base+two", "parameters": {"weight": 0.6, "density": 0.5}},
        ],
        "parameters": {"normalize": True, "lambda": 0.8},
    }
    assert of("negate", [1.0, 1.0])["parameters"] == {"normalize": False, "lambda": -1.0}
    assert of("linear", [1.0, -1.0])["merge_method"] == "task_arithmetic"
    for rule, weights, params, words in (
        ("ties", [0.4, -0.6], {"scope": "tensor"}, "not of their sizes"),
        ("ties", [0.4, 0.6], {}, "scope=tensor"),
        ("dare_ties", [0.4, 0.6], {}, "random"),
        ("iso_c", [1.0, 1.0], {}, "no method"),
        ("model_stock", [0.4, 0.6], {}, "no weights"),
    ):
        with pytest.raises(Unsupported, match=words):
            of(rule, weights, **params)
    assert set(MERGEKIT_METHODS) <= set(rules())


# Plans and budgets.


@fast
@pytest.mark.parametrize("rule", rules())
def test_a_plan_says_what_is_done(rule: str) -> None:
    """Exact where nothing is lost: the plan's word is the lineage's; the ranks that it allows are those that
    come out.
    """
    ours = Ours(rule)
    packs = [made(seed) for seed in range(1, 1 + len(ours.weights))]
    for rank in (None, 2, 17):
        told = plan(packs, rule=rule, weights=ours.weights, rank=rank)
        pack = ours.pack(packs, ours.weights, rank=rank)
        assert pack.manifest.lineage is not None
        lost = pack.manifest.lineage.params.get("truncation", {"total": 0.0})["total"]
        assert not (told.exact and lost > 1e-6), (rank, lost)
        assert told.exact or rank == 2 or ours.rule.cut
        most = {group.example: group.rank for group in told.groups}
        for group in pack.manifest.groups:
            assert (group.rank or 0) <= most[group.path]
        assert told.flops > 0 and all(group.why for group in told.groups)


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("linear", {}),
        ("svd", {"rank": 8}),
        ("ties", {"rank": 8}),
        ("knots_ties", {}),
        ("linear", {"budget": 0.3}),
        ("ties", {"budget": 40000}),
        ("tsv_m", {}),
    ],
)
def test_the_bound_on_memory_is_kept(rule: str, options: dict[str, Any]) -> None:
    """What numpy holds at the most while packs of 24 sites of 512 x 700 are composed is within the plan's
    bound.
    """
    sites = tuple(Site(f"s{number}", 700, 512) for number in range(24))
    packs = [made(seed, LoRA(r=9, alpha=9), sites=sites) for seed in (1, 2, 3)]
    bound = plan(packs, rule=rule, **options).memory_bound
    tracemalloc.start()
    try:
        compose(packs, rule=rule, **options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= bound


@fast
def test_a_budget_is_shared_out_with_the_least_error() -> None:
    """As many numbers as allowed at the most; the ranks are those of the largest S^2 / (m + n) over all sites
    of the dense sum; what gets nothing is listed, and the truncation is the error of the tensors.
    """
    packs, weights = [made(1), made(2, factor=0.3)], [0.7, -0.4]
    whole = deltas(compose(packs, weights=weights))
    spectra = {path: np.linalg.svd(D, compute_uv=False)[:6] for path, D in whole.items()}
    costs = {path: sum(D.shape) for path, D in whole.items()}
    for budget in (200, 0.5, 57):
        pack = compose(packs, weights=weights, budget=budget)
        assert pack.manifest.lineage is not None
        params = pack.manifest.lineage.params
        allowed = budget if budget >= 1 else int(budget * 2 * sum(3 * cost for cost in costs.values()))
        kept = {group.path: group.rank or 0 for group in pack.manifest.groups}
        used = sum(rank * costs[path] for path, rank in kept.items())
        assert used <= allowed < used + max(costs.values())
        assert set(params.get("left_out", [])) == set(whole) - set(kept)
        taken = [spectra[path][j] ** 2 / costs[path] for path, rank in kept.items() for j in range(rank)]
        left = [
            spectra[path][j] ** 2 / costs[path]
            for path in whole
            for j in range(kept.get(path, 0), 6)
            if costs[path] <= allowed - used
        ]
        assert not left or min(taken) >= max(left)
        found = deltas(pack)
        tail = sum(np.sum((D - found.get(path, 0 * D)) ** 2) for path, D in whole.items())
        total = sum(np.sum(D**2) for D in whole.values())
        assert params["truncation"]["total"] == pytest.approx(np.sqrt(tail / total), rel=1e-4)
    with pytest.raises(NothingToDo, match="does not hold one rank"):
        compose(packs, budget=20)
    with pytest.raises(ConfigError, match="both say where to cut"):
        compose(packs, budget=100, energy=0.9)
    dense = compose(packs, rule="ties", budget=150)
    assert sum((group.rank or 0) * costs[group.path] for group in dense.manifest.groups) <= 150


# Modules trained whole.


def headed(
    name: str,
    seed: int,
    labels: tuple[str, ...] | None,
    task: str = "text-classification",
    **more: np.ndarray,
) -> Pack:
    rng = np.random.default_rng(seed)
    count = len(labels or "ab")
    head = {
        "weight": rng.standard_normal((count, 5)).astype(np.float32),
        "bias": rng.standard_normal(count).astype(np.float32),
    }
    params = {
        "lora_A": rng.standard_normal((2, 8)).astype(np.float32),
        "lora_B": rng.standard_normal((6, 2)).astype(np.float32),
    }
    full = {"classifier": head} | ({"dense": dict(more)} if more else {})
    return build(
        name,
        lora,
        {Site("q", 8, 6): (LoRA(r=2), params)},
        task=m.PackTask(task, None, labels),
        base=BASE,
        full=full,
    )


@fast
def test_what_becomes_of_heads_is_said() -> None:
    """union: the rows of all labels in order, equal label sets averaged; pick: one pack's, with its labels;
    both are in the lineage.
    """
    a, b, c = headed("a", 1, ("no", "yes")), headed("b", 2, ("x", "y", "z")), headed("c", 3, ("no", "yes"))
    pack = compose([a, b, c], weights=[1.0, 0.5, 3.0], whole="union")
    head, parts = pack.full()["classifier"], [one.full()["classifier"] for one in (a, b, c)]
    assert pack.manifest.task.labels == ("no", "yes", "x", "y", "z")
    for key in ("weight", "bias"):
        np.testing.assert_allclose(
            head[key], np.concatenate([0.25 * parts[0][key] + 0.75 * parts[2][key], parts[1][key]]), rtol=1e-6
        )
    assert pack.manifest.lineage is not None and pack.manifest.lineage.params["whole"] == "union"
    picked = compose([a, b], whole="pick:b")
    assert picked.manifest.task.labels == ("x", "y", "z") and np.array_equal(
        picked.full()["classifier"]["weight"], parts[1]["weight"]
    )
    close(deltas(picked), deltas(compose([a, b], whole="union")))
    assert compose([b, a], recipe=recipe_of(picked)).id == picked.id
    same = np.ones((4, 4), np.float32)
    assert np.array_equal(
        compose(
            [headed("a", 1, ("n", "y"), weight=same), headed("b", 2, ("x", "z"), weight=same)], whole="union"
        ).full()["dense"]["weight"],
        same,
    )
    for packs, policy, words in (
        ([a, b], "average", "different labels"),
        ([a, headed("d", 4, None, "feature-extraction")], "average", "different tasks"),
        ([a, headed("d", 4, ("yes", "maybe"))], "union", "label in common"),
        ([a, headed("d", 4, None)], "union", "names none"),
        ([a, b], "pick:z", "none of the packs has that name"),
        ([a, b], "pick", "unknown policy"),
        ([a, b], "drop", "unknown policy"),
        (
            [headed("a", 1, ("n", "y"), weight=same), headed("b", 2, ("x", "z"), weight=2 * same)],
            "union",
            "comes before them, differs",
        ),
        ([headed("a", 1, ("n", "m"), weight=same), b], "union", "missing"),
    ):
        with pytest.raises(AdapterpackError, match=words) as raised:
            compose(packs, whole=policy)
        assert "To fix it" in str(raised.value)


def test_a_joined_head_gives_each_heads_logits(tiny_bert: Path, tmp_path: Path) -> None:
    """In a real model: the logits of a united pack are, side by side, those of each head on the same combined
    adapter.
    """
    packs = []
    for number, labels in enumerate((("no", "yes"), ("x", "y", "z"))):
        model = load_model(get_task("text-classification"), tiny_bert, list(labels), seed=number)
        model = adapterpack.adapt(
            model, LoRA(r=2, targets="all-linear", modules_to_save=("classifier",)), f"p{number}", seed=number
        )
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "lora_B" in name:
                    value.normal_(0, 0.3, generator=generator)
        packs.append(adapterpack.save(model, tmp_path / f"p{number}", base=tiny_bert))
    ids = torch.randint(5, 60, (3, 7), generator=torch.Generator().manual_seed(9))

    def logits(policy: str) -> np.ndarray:
        pack = compose(packs, weights=[0.7, 0.6], whole=policy)
        labels = list(pack.manifest.task.labels or ())
        model = attach(load_model(get_task("text-classification"), tiny_bert, labels), pack).eval()
        with torch.no_grad():
            found: np.ndarray = model(ids).logits.numpy()
        return found

    both = logits("union")
    assert both.shape == (3, 5)
    np.testing.assert_allclose(
        both, np.concatenate([logits("pick:p0"), logits("pick:p1")], axis=1), atol=1e-5
    )


# Data.


def test_moments_and_gradients_are_those_of_the_model(tiny_bert: Path, tmp_path: Path) -> None:
    """moment == X^T X / rows and fisher == mean (dL/dW)^2, from activations and autograd taken by hand;
    composed by the command.
    """
    labels, sentences = ["no", "yes"], ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9", "w2 w9"]
    for number in range(2):
        model = adapterpack.adapt(
            load_model(get_task("text-classification"), tiny_bert, labels),
            LoRA(r=2, targets=["query", "value"], modules_to_save=("classifier",)),
            f"p{number}",
            seed=number,
        )
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "lora_B" in name:
                    value.normal_(0, 0.3, generator=torch.Generator().manual_seed(number))
        adapterpack.save(model, tmp_path / f"p{number}", base=tiny_bert)
    rows = [{"text": text, "label": labels[number % 2]} for number, text in enumerate(sentences)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for kind in ("moment", "fisher"):
        done = CliRunner().invoke(
            main,
            [
                "measure",
                str(tiny_bert),
                str(tmp_path / "p0"),
                "--data",
                str(tmp_path / "rows.jsonl"),
                "--kind",
                kind,
                "-o",
                str(tmp_path / f"p0.{kind}"),
                "--json",
            ],
        )
        assert done.exit_code == 0, done.output
    pack = load(tmp_path / "p0")
    model = attach(load_model(get_task("text-classification"), tiny_bert, labels), pack).eval()
    path = next(adapter.site.path for adapter in pack.adapters())
    layer, inputs = model.get_submodule(path), []
    layer.register_forward_hook(
        lambda module, args, output: (
            (inputs.append(args[0].detach().double().numpy()), output.retain_grad())[0] and None
        )
    )
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    moment, fisher, count = 0.0, 0.0, 0
    for number, text in enumerate(sentences):
        batch = tokenizer(text, return_tensors="pt")
        kept: list[torch.Tensor] = []
        handle = layer.register_forward_hook(lambda module, args, output, kept=kept: kept.append(output))
        loss = model(**batch, labels=torch.tensor([number % 2])).loss
        (gradient,) = torch.autograd.grad(loss, kept)
        handle.remove()
        X, g = inputs[-1][0], gradient[0].double().numpy()
        moment, fisher, count = moment + X.T @ X, fisher + (g.T @ X) ** 2, count + len(X)
    for kind, wanted in (("moment", moment / count), ("fisher", fisher / len(sentences))):
        found = read_statistics(tmp_path / f"p0.{kind}")
        assert (found.pack, found.rows) == (pack.id, 4)
        np.testing.assert_allclose(found.matrices[path], wanted, rtol=2e-4, atol=1e-5 * np.abs(wanted).max())
    done = CliRunner().invoke(
        main,
        [
            "compose",
            str(tmp_path / "p0"),
            str(tmp_path / "p1"),
            "--rule",
            "regmean",
            "--data",
            str(tmp_path / "rows.jsonl"),
            "--data",
            str(tmp_path / "rows.jsonl"),
            "--base",
            str(tiny_bert),
            "-o",
            str(tmp_path / "both"),
        ],
    )
    assert done.exit_code == 0, done.output
    assert validate(tmp_path / "both").valid
    files = [tmp_path / f"both.p{number}.moment" for number in range(2)]
    again = compose([tmp_path / "p1", tmp_path / "p0"], recipe=tmp_path / "both", statistics=files)
    assert again.id == load(tmp_path / "both").id


@fast
def test_statistics_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """None, too few, of another kind, another pack, a rule that has no use for them, no statistics at all,
    and shapes that lie.
    """
    one, two = made(1), made(2)
    files = [measured(pack, "moment") for pack in (one, two)]
    wrong = Statistics("moment", two.id, 3, {"layers.q_proj": np.ones((4, 4), np.float32)})
    lies = Statistics(
        "moment", two.id, 3, {**files[1].matrices, "layers.q_proj": np.full((33, 33), np.nan, np.float32)}
    )
    for given, rule, words in (
        (None, "regmean", "second moments"),
        (files[:1], "regmean", "expected 2 files"),
        (files[::-1], "regmean", "another pack"),
        (files, "fisher", "another kind"),
        (files, "linear", "uses no data"),
        ([files[0], wrong], "regmean", "does not fit"),
        ([files[0], lies], "regmean", "not finite"),
    ):
        with pytest.raises(AdapterpackError, match=words):
            compose([one, two], rule=rule, statistics=given, rank=4)
    compose([one, two], out=tmp_path / "p")
    with pytest.raises(FormatError, match="no statistics"):
        read_statistics(tmp_path / "p" / "adapter_model.safetensors")


# The search for weights.


@pytest.mark.long
def test_the_search_finds_what_scores_best(tmp_path: Path) -> None:
    """On a target that is a sum of the packs, the weights of that sum, beyond equal weights; penalty and
    bound are kept; the recipe holds the weights, so that no score is needed to repeat it.
    """
    packs = [made(seed) for seed in (1, 2, 3)]
    parts = [deltas(pack) for pack in packs]
    target = {path: 0.9 * parts[0][path] - 0.5 * parts[1][path] for path in parts[0]}

    def score(pack: Pack) -> float:
        return -sum(
            float(np.sum((D - target[path]) ** 2) / np.sum(target[path] ** 2))
            for path, D in deltas(pack).items()
        )

    params = {"evaluations": 250, "penalty": 0.0}
    best = compose(packs, rule="lorahub", params=params, score=score, name="best")
    assert best.manifest.lineage is not None
    weights = [parent.weight for parent in best.manifest.lineage.parents]
    np.testing.assert_allclose(np.array(weights, float), [0.9, -0.5, 0.0], atol=0.02)
    assert score(best) > score(compose(packs))
    assert compose(packs[::-1], recipe=recipe_of(best)).id == best.id
    assert compose(packs, rule="lorahub", params=params, score=score, name="best").id == best.id
    for evaluations in (1, 7):
        tried: list[np.ndarray] = []
        found = search_weights(
            lambda w: (tried.append(w), float(-w.sum()))[1],  # noqa: B023
            2,
            evaluations=evaluations,
            bound=0.75,
        )
        assert (
            len(tried) == evaluations
            and all(np.abs(one).max() <= 0.75 for one in tried)
            and max(map(abs, found)) <= 0.75
        )
    for options, words in (
        ({}, "nothing says what is good"),
        ({"score": score, "weights": [1, 1, 1]}, "not searched for"),
        ({"score": lambda pack: float("nan")}, "not a finite number"),
        ({"score": score, "params": {"bound": 0.0}}, "bound.*expected float > 0"),
    ):
        with pytest.raises(AdapterpackError, match=words):
            compose(packs, rule="lorahub", **options)
    with pytest.raises(ConfigError, match="does not search for weights"):
        compose(packs, score=score)


@fast
def test_a_program_scores(tmp_path: Path) -> None:
    """--score runs one program with one folder, without a shell; what fails or prints no number is told, and
    nothing is left behind.
    """
    for seed in (1, 2):
        made(seed).write(tmp_path / f"p{seed}")
    script = tmp_path / "score.sh"
    script.write_text(
        '#!/bin/sh\ntest -f "$1/adapterpack.json" || exit 3\necho noise\nwc -c < '
        '"$1/adapter_model.safetensors"\n'
    )
    script.chmod(0o755)

    def run(*more: str) -> Any:
        return CliRunner().invoke(
            command,
            [
                str(tmp_path / "p1"),
                str(tmp_path / "p2"),
                "--rule",
                "lorahub",
                "--param",
                "evaluations=3",
                "-o",
                str(tmp_path / "out"),
                *more,
            ],
        )

    done = run("--score", str(script), "--json")
    assert done.exit_code == 0, done.output
    assert load(tmp_path / "out").manifest.lineage.operation == "lorahub"
    for text, words in (
        ("#!/bin/sh\necho oops >&2; exit 3\n", "oops"),
        ("#!/bin/sh\necho fine\n", "no number"),
    ):
        script.write_text(text)
        failed = CliRunner().invoke(
            command,
            [str(tmp_path / "p1"), "--rule", "lorahub", "--score", str(script), "-o", str(tmp_path / "none")],
        )
        assert isinstance(failed.exception, ConfigError) and words in str(failed.exception)
    failed = CliRunner().invoke(
        command,
        [
            str(tmp_path / "p1"),
            "--rule",
            "lorahub",
            "--score",
            str(script) + "; true",
            "-o",
            str(tmp_path / "none"),
        ],
    )
    assert "not an executable" in str(failed.exception) and not (tmp_path / "none").exists()
    assert not list(tmp_path.glob("*partial*"))


@fast
def test_the_command_plans_and_repeats(tmp_path: Path) -> None:
    """--plan does nothing; --write-recipe and --recipe go round; --to-mergekit is YAML with the paths that
    were given.
    """
    for seed in (1, 2):
        made(seed).write(tmp_path / f"p{seed}")
    packs = [str(tmp_path / "p1"), str(tmp_path / "p2")]
    made_by = CliRunner().invoke
    told = made_by(command, [*packs, "--rule", "ties", "--rank", "4", "--plan"])
    assert told.exit_code == 0 and "not exact" in told.output and "dense entries" in told.output
    told = made_by(command, [*packs, "--rule", "svd", "--rank", "4", "--plan", "--json"])
    assert json.loads(told.output)["plan"]["groups"][0]["path"] == "joint bases"
    assert len(list(tmp_path.iterdir())) == 2
    done = made_by(
        command,
        [
            *packs,
            "--budget",
            "0.5",
            "-o",
            str(tmp_path / "b"),
            "--write-recipe",
            str(tmp_path / "b.json"),
            "--to-mergekit",
            str(tmp_path / "b.yaml"),
        ],
    )
    assert done.exit_code == 0, done.output
    again = made_by(command, [*packs[::-1], "--recipe", str(tmp_path / "b.json"), "-o", str(tmp_path / "c")])
    assert again.exit_code == 0, again.output
    assert load(tmp_path / "c").renamed("b").id == load(tmp_path / "b").id
    text = (tmp_path / "b.yaml").read_text()
    assert "budget 0.5" in text and yaml.safe_load(text)["models"][1]["model"].endswith("p2")
    assert made_by(command, packs).exit_code == 2
