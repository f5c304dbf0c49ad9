"""Methods of other packages: found through an entry point, held to every promise; and the promises catch a
method that breaks them.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from invariants.matrix import INVARIANTS

import adapterpack.registry as registries
from adapterpack import ALoRA, testing
from adapterpack.adapter_methods import (
    Dense,
    Diagonal,
    Method,
    NormalForm,
    broken_plugins,
    get,
    methods,
    register,
    registry,
)
from adapterpack.adapter_methods.alora import alora
from adapterpack.adapter_methods.core.site import Site
from adapterpack.adapter_methods.core.token_positions import Invoked
from adapterpack.adapter_methods.forms.attention import AttentionForm
from adapterpack.adapter_methods.forms.prompt import STORED, PromptForm
from adapterpack.adapter_methods.llama_adapter import llama_adapter
from adapterpack.adapter_methods.lora import LoRA, lora
from adapterpack.adapter_methods.prefix_tuning import prefix_tuning as prefix
from adapterpack.adapter_methods.prompt_tuning import prompt_tuning as prompt
from adapterpack.errors import AdapterpackError, UnknownMethod
from adapterpack.manifest.structs import Base, PackTask
from adapterpack.pack.pack import build
from adapterpack.testing import LAYERS, Case, cases

pytestmark = pytest.mark.fast

EXAMPLE = Path(__file__).parent.parent / "examples" / "new_method.py"


def distribution(folder: Path, entry: str) -> Path:
    """An installed distribution, as pip leaves it: metadata and an entry point."""
    info = folder / "a_plugin-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: a-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[adapterpack.methods]\n{entry}\n")
    return folder


PROMISED = sum(invariant.needs(methods()["lora"]) for invariant in INVARIANTS) - 4
"""What a weight method promises that is not additive, not of low rank, and unknown to PEFT."""


def python(*arguments: str, path: Path | None = None, cwd: Path | None = None) -> str:
    """The standard output of a fresh interpreter, one thread, with ``path`` importable."""
    places = [str(place) for place in (path, EXAMPLE.parents[1], Path(__file__).parent) if place]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(places)}
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
        cwd=cwd,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_method_of_another_package_stands_in_the_catalogue(tmp_path: Path) -> None:
    """Installed beside adapterpack, it is listed, and has its column in the table; that it keeps its
    promises, the example proves.
    """
    shutil.copy(EXAMPLE, distribution(tmp_path, "scaling = new_method:scaling"))
    program = (
        "from adapterpack.adapter_methods import get, methods\n"
        "from invariants.matrix import INVARIANTS, render\n"
        "method = get('scaling')\n"
        "promised = [i.name for i in INVARIANTS if i.needs(method)]\n"
        "assert '| n/a (additive) |' in render([method]) and '| n/a (peft) |' in render([method])\n"
        "print(*methods(), len(promised))\n"
    )
    *known, promised = python("-c", program, path=tmp_path).split()
    assert known == sorted({*methods(), "scaling"})
    assert int(promised) == PROMISED, "all but additive, low_rank and the two of peft"
    assert "scaling" not in methods(), "it left nothing behind in this process"


@pytest.mark.long
def test_the_example_runs() -> None:
    """`python examples/new_method.py` proves the method and says how many promises hold."""
    without = {"additive", "low_rank", "peft"}
    kept = [i for i in testing.INVARIANTS if i.needs(lora) and i.trait not in without]
    promised = sum(len(set(i.layers or LAYERS) & set(LAYERS)) * (1 if i.first else 2) for i in kept)
    assert python(str(EXAMPLE)) == f"{promised} promises hold\n"


@pytest.mark.long
def test_the_example_that_peft_loads_runs() -> None:
    """`python examples/new_peft_method.py` proves the method, and PEFT computes the same from its pack."""
    assert python(str(EXAMPLE.with_name("new_peft_method.py"))).endswith(
        "promises hold\nPEFT computes the same from the pack's folder\n"
    )


BROKEN = {
    "no such module": ("broken = no_such_module_of_a_plugin:method", "", "No module named"),
    "an error at import": (
        "broken = a_plugin_with_an_error:method",
        "raise RuntimeError('needs another numpy')",
        "needs another numpy",
    ),
    "an exit at import": (
        "broken = a_plugin_that_exits:method",
        "raise SystemExit('needs a license')",
        "needs a license",
    ),
    "no such attribute": ("broken = a_plugin_without:method", "other = 1", "no attribute 'method'"),
    "no method": ("broken = a_plugin_of_text:method", "method = 'lora'", "no Method but a str"),
    "a name that is taken": (
        "broken = a_plugin_twice:method",
        "from adapterpack.adapter_methods.lora import lora\nmethod = lora._replace(summary='mine')",
        "the same name",
    ),
    "the name of one that comes along": (
        "lora = a_plugin_called_lora:method",
        "raise RuntimeError('mine')",
        "mine",
    ),
}
"""A plugin that is of no use -> its entry point, its module, and what is said of it."""


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_plugin_leaves_the_others_and_says_what_is_wrong(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other method is there as ever; who asks for the broken one by its name gets the reason."""
    (entry, source, reason), known = BROKEN[kind], methods()
    folder = distribution(tmp_path, entry)
    (folder / f"{entry.split()[2].partition(':')[0]}.py").write_text(source) if source else None
    monkeypatch.syspath_prepend(folder)
    assert methods() == known
    [error] = broken_plugins()
    assert error.where == entry
    assert reason in error.what
    assert get("lora") is lora
    if entry.startswith("broken"):
        with pytest.raises(AdapterpackError) as caught:
            get("broken")
        assert (caught.value.where, caught.value.what) == (entry, error.what)
    with pytest.raises(UnknownMethod) as unknown:
        get("lorra")
    assert unknown.value.remedy is not None
    assert "'lora'" in unknown.value.remedy
    assert entry in unknown.value.remedy, "perhaps it is there that it would be"


def test_a_broken_plugin_is_one_line_of_the_catalogue_and_no_concern_of_other_commands(
    tmp_path: Path,
) -> None:
    """Really installed, in a process of its own."""
    entry, source, _ = BROKEN["an exit at import"]
    folder = distribution(tmp_path / "site", entry)
    (folder / "a_plugin_that_exits.py").write_text(source)
    params = {"lora_A": np.ones((2, 4), np.float32), "lora_B": np.ones((6, 2), np.float32)}
    pack = build(
        "tickets",
        lora,
        {Site("layers.0.fc", 4, 6): (LoRA(r=2), params)},
        task=PackTask("feature-extraction"),
        base=Base(),
    )
    pack.write(tmp_path / "pack")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "adapter_config.json").write_text('{"peft_type": "OF_NOBODY"}')
    commands = [
        ["methods"],
        ["validate", "pack"],
        ["convert", "pack", "-o", "out", "--to", "diffusers"],
        ["convert", "out", "-o", "back", "--to", "pack"],
        ["methods", "broken"],
        ["inspect", "theirs"],
    ]
    program = (
        "import contextlib, io, json\nfrom adapterpack.cli.main import main\n"
        f"for command in {commands!r}:\n"
        "    out, err = io.StringIO(), io.StringIO()\n"
        "    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):\n"
        "        try: main(command)\n"
        "        except SystemExit as done: code = done.code\n"
        "    print(json.dumps([code, out.getvalue(), err.getvalue()]))\n"
    )
    catalogue, validated, there, back, named, foreign = map(
        json.loads, python("-c", program, path=folder, cwd=tmp_path).splitlines()
    )
    assert catalogue[0] == 0
    [warning] = catalogue[2].splitlines()
    assert warning.startswith("warning: ")
    assert entry in warning
    assert all(name in catalogue[1] for name in methods())
    assert [validated[0], there[0], back[0]] == [0, 0, 0], [validated, there, back]
    assert named[0] == foreign[0] == 1
    assert entry in named[2]
    assert "needs a license" in named[2]
    assert "not supported" in foreign[2]


def test_a_method_is_found_by_its_name_or_its_class_and_no_other_package_is_imported(tmp_path: Path) -> None:
    """A package whose method nobody asked for stays unimported."""
    folder = distribution(tmp_path, "scaling = new_method:scaling\nslow = a_slow_plugin:method")
    shutil.copy(EXAMPLE, folder)
    (folder / "a_slow_plugin.py").write_text(
        "from adapterpack.adapter_methods.lora import lora\nmethod = lora._replace(name='slow')"
    )
    program = (
        "import sys\n"
        "from adapterpack import LoRA\n"
        "from adapterpack.adapter_methods import get, method_of\n"
        "assert method_of(LoRA()) is get('lora')\n"
        "assert get('scaling').name == 'scaling' and method_of(get('scaling').config()) is get('scaling')\n"
        "print('a_slow_plugin' in sys.modules)\n"
    )
    assert python("-c", program, path=folder) == "False\n"


def test_metadata_is_read_once_until_something_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The entry points of a hundred distributions take 30 ms to read; a plugin that is installed meanwhile is
    there at once.
    """
    read: list[str] = []
    monkeypatch.setattr(
        registries, "entry_points", lambda group: (read.append(group), entry_points(group=group))[1]
    )
    monkeypatch.syspath_prepend(tmp_path)
    known = methods()
    assert (methods(), read) == (known, ["adapterpack.methods"])
    distribution(tmp_path, "late = no_such_module_of_a_plugin:method")
    assert [error.where for error in broken_plugins()] == ["late = no_such_module_of_a_plugin:method"]


@pytest.mark.parametrize("name", ["lora", "LoRA", "", "x y", "x\n", "é", "9x"])
def test_a_name_that_is_taken_or_that_no_manifest_holds_is_refused(name: str) -> None:
    """Registered names are unique, and are those that the manifest's schema allows."""
    with pytest.raises(AdapterpackError, match="name"):
        register(lora._replace(name=name))
    assert get("lora") is lora


class Loose(LoRA):
    """A config that swallows whatever it is given."""

    def __new__(cls, **given: Any) -> Any:
        return object.__new__(cls)

    def __init__(self, **given: Any) -> None:
        super().__init__(
            **{name: value for name, value in given.items() if name in LoRA.__dataclass_fields__}
        )


class IntegerScale(LoRA):
    """A config whose scale is not the number that multiplies the branch."""

    @property
    def scale(self) -> float:
        return round(super().scale) + 1


class UnderstatedRank(LoRA):
    """A config that claims half the rank that its tensors have."""

    @property
    def rank(self) -> int:
        return max(1, self.r // 2)


def numpy_only(cfg: Any, params: Any, site: Any) -> NormalForm:
    """Another formula for arrays that are not numpy's."""
    factor = cfg.scale if isinstance(params["lora_A"], np.ndarray) else 2 * cfg.scale
    return NormalForm(down=Dense(params["lora_A"]), up=Dense(factor * params["lora_B"]))


def uphill(cfg: Any, params: Any, site: Any) -> NormalForm:
    """The right values, with gradients of the wrong sign."""
    B = params["lora_B"]
    B = 2 * B.detach() - B if hasattr(B, "detach") else B
    return NormalForm(down=Dense(params["lora_A"]), up=Dense(cfg.scale * B))


def in_place(cfg: Any, params: Any, site: Any, weight: Any, bias: Any, rows: slice) -> Any:
    """A fold into the caller's own array."""
    weight += cfg.scale * params["lora_B"][rows] @ params["lora_A"]
    return weight, bias


def block_norm(cfg: Any, params: Any, site: Any, weight: Any, bias: Any, rows: slice) -> Any:
    """A fold that looks at all rows of what it is given, while it claims to be separable by rows."""
    return weight * (1 + (weight**2).sum()), bias


def without_bias(cfg: Any, params: Any, site: Any, weight: Any, bias: Any, rows: slice) -> Any:
    """The fold of a scaling method that forgets the bias."""
    return weight * (1 + params["lora_B"][rows, :1]), bias


def scaled(cfg: Any, params: Any, site: Any) -> NormalForm:
    """A change that depends on the weight: not additive."""
    return NormalForm(pre=Diagonal(1 + params["lora_A"][0]), output_scale=1 + params["lora_B"][:, 0])


def affine(cfg: Any, params: Any, site: Any) -> NormalForm:
    """A scale and a shift, whose order matters."""
    return NormalForm(output_scale=1 + params["lora_B"][:, 0], shift=0 * params["lora_B"][:, 0] + 1)


def wider(cfg: Any, params: Any, site: Any) -> NormalForm:
    """A scale that is a numpy scalar, which widens float32 to float64."""
    return NormalForm(down=Dense(params["lora_A"]), up=Dense(np.float64(cfg.scale) * params["lora_B"]))


def noisy(cfg: Any, site: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """An initialisation that is not the identity."""
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in lora.shapes(cfg, site).items()}


def unused(cfg: Any, site: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One parameter more than the formula uses."""
    return {**lora.init(cfg, site, rng), "idle": np.ones(3, np.float32)}


def with_junk(cfg: Any, site: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A frozen random matrix that a seed could have given."""
    return {**lora.init(cfg, site, rng), "basis": rng.normal(size=(site.out_features, 64)).astype(np.float32)}


def mixing(cfg: Any, params: Any, site: Any, base: Any, x: Any, drop: Any) -> Any:
    """A forward pass that takes the batch's mean off."""
    return base(x) + cfg.scale * ((x - x.mean(0)) @ params["lora_A"].T) @ params["lora_B"].T


def doubled(cfg: Any, params: Any, site: Any, base: Any, x: Any, drop: Any) -> Any:
    """A forward pass that is not the normal form's."""
    return base(x) + 2 * cfg.scale * (x @ params["lora_A"].T) @ params["lora_B"].T


def greedy(cfg: Any, params: Any, site: Any) -> NormalForm:
    """Changes the base's own weight, which it was only lent."""
    site.weight[:] += 0.01
    return lora.normal_form(cfg, params, site)


def forgetful(cfg: Any, params: Any, site: Any) -> NormalForm:
    """Another factor at every call."""
    return NormalForm(down=Dense(params["lora_A"]), up=Dense((cfg.scale + next(CALLS)) * params["lora_B"]))


def looking(cfg: Any, params: Any, site: Any) -> NormalForm:
    """Decides by a value, which no compiler can trace."""
    factor = 2 if float(params["lora_A"].sum()) > 0 else 3
    return NormalForm(down=Dense(params["lora_A"]), up=Dense(factor * params["lora_B"]))


CALLS = itertools.count()
LENT = dataclasses.replace(lora.traits, reads_weight=True)


def uphill_prompt(cfg: Any, params: Any, site: Any) -> PromptForm:
    """The right virtual embeddings, with gradients of the wrong sign."""
    P = params[STORED]
    return PromptForm(embeds=2 * P.detach() - P if hasattr(P, "detach") else P)


def restless(cfg: Any, params: Any, site: Any) -> PromptForm:
    """Another prompt at every look."""
    return PromptForm(embeds=params[STORED] * next(LOOKS))


def turned(config: Any) -> Any:
    """PEFT's config read with heads and their width exchanged."""
    assert prefix.peft is not None
    cfg = prefix.peft.from_config(config)
    return dataclasses.replace(cfg, num_heads=cfg.head_dim, head_dim=cfg.num_heads)


class Counting(Invoked):
    """A rule that counts padding: from the third position on."""

    def mask(self, ids: Any, real: Any, prompt: Any, before: Any) -> Any:
        return real & (0 * ids == 0) & ((0 * ids + 1).cumsum(1) > 2)


class Answering(Invoked):
    """A rule that goes by what a later token is."""

    def mask(self, ids: Any, real: Any, prompt: Any, before: Any) -> Any:
        return super().mask(ids, real, prompt, None) if before is None else real & (ids == 21)


class Counted(ALoRA):
    """An adapter that acts by :class:`Counting`."""

    @property
    def acts(self) -> Invoked:
        return Counting(self.alora_invocation_tokens)


class Answered(ALoRA):
    """An adapter that acts by :class:`Answering`."""

    @property
    def acts(self) -> Invoked:
        return Answering(self.alora_invocation_tokens)


def renamed(config: Callable[..., Any], method: Method = lora) -> tuple[Any, ...]:
    return tuple(config(**dataclasses.asdict(example)) for example in method.examples)


assert lora.peft is not None
assert prefix.peft is not None
LOOKS = itertools.count(1)
FAULTS: dict[str, Method] = {
    "identity_at_init": lora._replace(init=noisy),
    "trained_adapter_changes_the_output": lora._replace(normal_form=lambda cfg, params, site: NormalForm()),
    "fold_equals_forward": lora._replace(normal_form=scaled, overrides={"fold": without_bias}),
    "fold_in_row_blocks": lora._replace(overrides={"fold": block_norm}),
    "torch_equals_numpy": lora._replace(normal_form=numpy_only),
    "gradients_reach_every_parameter": lora._replace(init=unused),
    "loss_falls": lora._replace(normal_form=uphill),
    "shapes_declared": lora._replace(
        shapes=lambda cfg, site: {name: shape[::-1] for name, shape in lora.shapes(cfg, site).items()}
    ),
    "inputs_unchanged": lora._replace(overrides={"fold": in_place}),
    "dtype_kept": lora._replace(normal_form=wider),
    "additive_law": lora._replace(normal_form=scaled),
    "low_rank_law": lora._replace(config=UnderstatedRank, examples=renamed(UnderstatedRank)),
    "config_schema": lora._replace(config=Loose, examples=renamed(Loose)),
    "rows_do_not_mix": lora._replace(overrides={"forward": mixing}),
    "in_order": lora._replace(normal_form=affine),
    "only_the_adapter_trains": lora._replace(normal_form=greedy, traits=LENT),
    "disabled_is_the_base": lora._replace(normal_form=greedy, traits=LENT),
    "layer_agrees": lora._replace(normal_form=numpy_only),
    "checkpointed_gradients": lora._replace(normal_form=forgetful),
    "every_kind_agrees": lora._replace(normal_form=numpy_only),
    "trained_and_packed": lora._replace(
        storage=lora.storage._replace(
            to_stored=lambda cfg, params, site: (cfg, {**params, "lora_B": 2 * params["lora_B"]})
        )
    ),
    "compiled_gradients": lora._replace(normal_form=looking),
    "onnx_agrees": lora._replace(overrides={"forward": doubled}),
    "file_size": lora._replace(
        init=with_junk,
        peft=None,
        storage=lora.storage._replace(to_stored=None),
        traits=dataclasses.replace(lora.traits, frozen=("basis",)),
    ),
    "peft_parity": lora._replace(
        peft=lora.peft._replace(to_config=lambda sites: {**lora.peft.to_config(sites), "lora_alpha": 1})
    ),
    "pack_round_trip": lora._replace(init=unused, storage=lora.storage._replace(to_stored=None)),
    "scale_recomputed": lora._replace(config=IntegerScale, examples=renamed(IntegerScale)),
    "peft_round_trip": lora._replace(
        peft=lora.peft._replace(from_config=lambda config: LoRA(r=config["r"], alpha=1))
    ),
    "acts_at_its_positions": alora._replace(config=Counted, examples=renamed(Counted, alora)),
    "positions_on_a_cache": alora._replace(config=Answered, examples=renamed(Answered, alora)),
    "disabled_attention_is_the_base": llama_adapter._replace(
        init=lambda cfg, site, rng: {
            **llama_adapter.init(cfg, site, rng),
            "adaption_gate": np.ones(1, np.float32),
        }
    ),
    "attended_rows_never_mix": llama_adapter._replace(
        normal_form=lambda cfg, params, site: AttentionForm(
            params["adaption_prompt"][0], params["adaption_gate"] * next(LOOKS)
        )
    ),
    "attended_onnx_agrees": llama_adapter._replace(
        normal_form=lambda cfg, params, site: AttentionForm(
            params["adaption_prompt"][0],
            params["adaption_gate"] * (1 if isinstance(params["adaption_gate"], np.ndarray) else 2),
        )
    ),
    "decoder_gradients": llama_adapter._replace(
        init=lambda cfg, site, rng: {**llama_adapter.init(cfg, site, rng), "idle": np.ones(3, np.float32)}
    ),
    "compiled_decoder_gradients": llama_adapter._replace(
        normal_form=lambda cfg, params, site: AttentionForm(
            params["adaption_prompt"][0], params["adaption_gate"] * next(LOOKS)
        )
    ),
    "only_the_adapter_trains_there": llama_adapter._replace(
        init=lambda cfg, site, rng: {**llama_adapter.init(cfg, site, rng), "idle": np.ones(3, np.float32)}
    ),
    "active_together": lora._replace(normal_form=numpy_only),
    "folded_onnx_agrees": lora._replace(overrides={"fold": block_norm}),
    "form_as_declared": prompt._replace(
        normal_form=lambda cfg, params, site: PromptForm(embeds=params[STORED][1:])
    ),
    "form_torch_equals_numpy": prompt._replace(
        normal_form=lambda cfg, params, site: PromptForm(
            embeds=params[STORED] * (1 if isinstance(params[STORED], np.ndarray) else 2)
        )
    ),
    "form_gradients_reach_every_parameter": prompt._replace(
        init=lambda cfg, site, rng: {**prompt.init(cfg, site, rng), "idle": np.ones(3, np.float32)}
    ),
    "form_loss_falls": prompt._replace(normal_form=uphill_prompt),
    "form_dtype_kept": prompt._replace(
        normal_form=lambda cfg, params, site: PromptForm(embeds=params[STORED] * np.float64(1))
    ),
    "form_kept_by_packing": prompt._replace(
        storage=prompt.storage._replace(
            to_stored=lambda cfg, params, site: (cfg, {STORED: params[STORED] + 1})
        )
    ),
    "form_kept_by_peft": prefix._replace(peft=prefix.peft._replace(from_config=turned)),
    "disabled_prompt_is_the_base": prefix._replace(
        normal_form=lambda cfg, params, site: PromptForm(
            cache=prefix.normal_form(cfg, params, site).cache[:, :, :, :0]
        )
    ),
    "prompted_rows_never_mix": prompt._replace(normal_form=restless),
}


@pytest.mark.parametrize(
    "invariant",
    [
        pytest.param(one, id=one.name, marks=[pytest.mark.long] * one.name.startswith("compiled_"))
        for one in INVARIANTS
    ],
)
def test_every_invariant_catches_a_method_that_breaks_it(
    invariant: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For each promise a method with one fault, put in the place of the sound one, fails on a case of the
    matrix; the sound one passes.
    """
    fault = FAULTS[invariant.name]
    sound = get(fault.name)
    monkeypatch.setitem(registry.METHODS._values, fault.name, fault)
    assert invariant.needs(fault)

    def broken(case: Case) -> bool:
        try:
            invariant.check(case)
        except (AssertionError, AdapterpackError, RuntimeError):
            return True
        return False

    assert any(broken(case) for case in cases(fault) if invariant.holds_for(case))
    monkeypatch.undo()
    sound = sound._replace(examples=sound.examples[:1])
    assert not any(broken(case) for case in cases(sound) if invariant.holds_for(case)), (
        "the matrix tests the other examples"
    )


def test_every_invariant_has_a_fault() -> None:
    """The table above names every invariant: a new one needs a method that breaks it."""
    assert set(FAULTS) == {invariant.name for invariant in INVARIANTS}
