"""Adapters that act at some positions of a row: against PEFT and float64 references, on caches, in training,
in bundles; and refusals.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, BartConfig, BartModel

import adapterpack as ap
from adapterpack.adapter_methods import get
from adapterpack.adapter_methods.core.token_positions import Ends, Invoked
from adapterpack.errors import AdapterpackError, ConfigError, FormatError, NothingToDo, Unsupported
from adapterpack.pack.pack import build
from adapterpack.peft import layout
from adapterpack.runtime.padding import pad

TOKENS = (7, 8)
ROWS = [[5, 7, 8, 3, 7, 8, 9, 10], [7, 8, 4], [3, 4, 5, 6, 11], [9, 9, 9, 9, 9, 9, 7, 8], [8, 7]]
CONFIGS: dict[str, Any] = {
    "activated": ap.ALoRA(r=3, alpha=5, alora_invocation_tokens=TOKENS),
    "ends": ap.LoReFT(r=2, positions="f2+l1"),
    "lora": ap.LoRA(r=2),
    "prompt": ap.PromptTuning(num_virtual_tokens=3),
}
CLOSE = 2e-5
"""float32 logits of about 5, summed in another order."""


@pytest.fixture
def llama(tiny_llama: Path) -> Any:
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


def moved(model: Any, config: Any, name: str = "a") -> Any:
    """The model with a fresh adapter, moved by noise."""
    ap.adapt(model, config, name)
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=0.3)
    return model


def batch(rows: list[list[int]] = ROWS, left: bool = False) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(value) for key, value in pad(rows, 0, left=left).items()}


def logits(model: Any, left: bool = False, **more: Any) -> torch.Tensor:
    """The real positions of all rows, one after the other."""
    given = batch(left=left)
    with torch.no_grad():
        return model(**given, **more).logits[given["attention_mask"] > 0]


def last_start(row: list[int]) -> int | None:
    """Where the last invocation of a row begins, the longhand way."""
    return max((at for at in range(len(row)) if tuple(row[at : at + 2]) == TOKENS), default=None)


def test_the_rules_equal_the_longhand_way() -> None:
    """Random ragged rows of three letters, padded on both sides with a letter of the invocation: masks equal
    loops over each row.
    """
    rng = np.random.default_rng(0)
    for _ in range(60):
        rows = [rng.integers(7, 10, rng.integers(1, 9)).tolist() for _ in range(4)]
        for left in (False, True):
            given = pad(rows, 7, left=left)
            real = given["attention_mask"] > 0
            found = Invoked(TOKENS).mask(given["input_ids"], real, real, None)
            ends = Ends(2, 3).mask(given["input_ids"], real, real, None)
            for row, mine, theirs, mask in zip(rows, found, ends, real, strict=True):
                start = last_start(row)
                assert mine[mask].tolist() == [start is not None and at >= start for at in range(len(row))]
                assert theirs[mask].tolist() == [at < 2 or at >= len(row) - 3 for at in range(len(row))]
                assert not mine[~mask].any() and not theirs[~mask].any()
    ids = np.array([[1], [7], [1]])
    real = np.ones((3, 1), bool)
    assert Invoked((7,)).mask(ids, real, real, np.array([True, False, False]))[:, 0].tolist() == [
        True,
        True,
        False,
    ]
    assert not Ends(9, 9).mask(ids, real, real, np.array([True, True, True])).any()


@pytest.mark.parametrize("left", [False, True])
def test_activated_lora_equals_peft(llama: Any, tiny_llama: Path, tmp_path: Path, left: bool) -> None:
    """PEFT on our folder gives our logits on ragged rows (two invocations, one at the very start, none, half
    of one), and our tokens.
    """
    model = moved(llama, CONFIGS["activated"])
    ap.save(model, tmp_path / "a", base=tiny_llama)
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_llama), str(tmp_path / "a")
    ).eval()
    base = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    given = batch(left=left)
    with torch.no_grad():
        mine, peers, plain = (one(**given).logits for one in (model, theirs, base))
    real = given["attention_mask"] > 0
    assert float((mine - peers)[real].abs().max()) < CLOSE
    for row, ids in enumerate(ROWS):
        own, start = (mine - plain)[row][real[row]].abs().amax(-1), last_start(ids)
        assert not own[:start].any(), "the base's, to the bit, before the invocation and where there is none"
        assert start is None or bool((own[start:] > 1e-3).all())
    if left:
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        mine, peers, plain = (one.generate(**given, **options) for one in (model, theirs, base))
        assert (
            torch.equal(mine, peers) and torch.equal(mine[2], plain[2]) and not torch.equal(mine[0], plain[0])
        )


def test_pefts_own_folder_is_read(llama: Any, tiny_llama: Path, tmp_path: Path) -> None:
    """A folder that PEFT wrote is an activated LoRA with its tokens, gives PEFT's logits, and is written with
    PEFT's keys again.
    """
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "down_proj"],
        alora_invocation_tokens=list(TOKENS),
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config).eval()
    theirs.save_pretrained(str(tmp_path / "peft"))
    pack = ap.load(tmp_path / "peft")
    assert pack.method.name == "alora" and pack.acts == Invoked(TOKENS)
    given = batch()
    real = given["attention_mask"] > 0
    with torch.no_grad():
        mine, peers = ap.attach(llama, pack, check_base=False)(**given).logits, theirs(**given).logits
    assert float((mine - peers)[real].abs().max()) < CLOSE
    pack.write(tmp_path / "pack")
    written = json.loads((tmp_path / "pack" / layout.CONFIG).read_bytes())
    assert written["alora_invocation_tokens"] == [7, 8] and written["peft_type"] == "LORA"


@pytest.mark.parametrize("left", [False, True])
def test_loreft_changes_the_ends_of_each_row(llama: Any, tiny_llama: Path, left: bool) -> None:
    """Logits equal a float64 model whose layers' outputs are changed row by row at the first two and the last
    position.
    """
    model = moved(llama, CONFIGS["ends"])
    found = logits(model, left)
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama).double().eval()
    loreft = get("loreft")
    ends: list[int] = []
    for layer, mine in zip(plain.model.layers, model.model.layers, strict=True):
        form = loreft.normal_form(
            CONFIGS["ends"], {key: np.float64(value) for key, value in mine._params("a").items()}, mine._site
        )
        down, up, shift = (
            torch.from_numpy(np.array(value))
            for value in (form.down.dense(), form.up.dense(), form.down_bias)
        )

        def change(
            module: Any, args: Any, h: torch.Tensor, down: Any = down, up: Any = up, shift: Any = shift
        ) -> torch.Tensor:
            h = h.clone()
            h[:, ends] += (h[:, ends] @ down.T + shift) @ up.T
            return h

        layer.register_forward_hook(change)
    expected = []
    for row in ROWS:
        ends[:] = sorted({0, min(1, len(row) - 1), len(row) - 1})
        with torch.no_grad():
            expected.append(plain(torch.tensor([row])).logits[0])
    np.testing.assert_allclose(found, torch.cat(expected), rtol=0, atol=CLOSE)


def test_a_cache_of_the_base_is_gone_on_with(llama: Any) -> None:
    """The base reads a context; the adapter, invoked behind it on that cache, gives what it gives on the
    whole row. LoReFT cannot.
    """
    model = moved(moved(llama, CONFIGS["activated"], "a"), CONFIGS["ends"], "e")
    context, rest = torch.tensor([ROWS[0][:4]]), torch.tensor([ROWS[0][4:]])
    with torch.no_grad():
        whole = ap.active(model, "a")(torch.cat([context, rest], dim=1)).logits[:, 4:]
        for name in ("a", "e"):
            first = ap.active(model, None)(context, use_cache=True)
            ap.active(model, name)
            if name == "e":
                with pytest.raises(Unsupported, match="filled without the adapter"):
                    model(rest, past_key_values=first["cache"])
                continue
            found = model(rest, past_key_values=first["cache"])
            np.testing.assert_allclose(found.logits, whole, rtol=0, atol=CLOSE)
            with pytest.raises(Unsupported, match="other rows"):
                model(rest[:, :1].repeat(2, 1), past_key_values=found["cache"])


@pytest.mark.parametrize("name", ["activated", "ends"])
def test_layers_computed_twice_find_their_own_pass(llama: Any, name: str) -> None:
    """Two passes of other rows before one backward pass: gradients with checkpointing are those without, to
    the bit.
    """
    model = moved(llama, CONFIGS[name]).train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        loss = sum((model(**batch([row])).logits ** 2).mean() for row in (ROWS[0], ROWS[2], ROWS[3]))
        loss.backward()  # type: ignore[union-attr]
        gradients.append([value.grad.clone() for value in model.parameters() if value.grad is not None])
    assert gradients[0] and all(map(torch.equal, *gradients))


def test_the_prompt_of_a_training_row_ends_at_its_first_label(llama: Any) -> None:
    """LoReFT at the last position: with labels it acts where the prompt ends, which is what it does on the
    prompt alone.
    """
    model = moved(llama, ap.LoReFT(r=2, positions="l1"))
    given = batch(ROWS[:1])
    labels = torch.where(torch.arange(8) < 4, -100, given["input_ids"])
    with torch.no_grad():
        trained, alone = model(**given, labels=labels).logits, model(given["input_ids"][:, :4]).logits
        assert torch.allclose(trained[:, :4], alone, atol=CLOSE)
        assert not torch.allclose(trained[:, :4], model(**given).logits[:, :4], atol=1e-3)


def test_training_moves_what_is_invoked_alone(llama: Any) -> None:
    """Steps of Adam lower the loss of invoked rows; the base's logits and rows without an invocation stay
    what they were, to the bit.
    """
    base = logits(llama)
    model = ap.adapt(llama, CONFIGS["activated"], "a").train()
    optimizer = torch.optim.Adam([value for value in model.parameters() if value.requires_grad], lr=0.02)
    losses = []
    for _ in range(12):
        loss = model(**batch(ROWS[:2]), labels=batch(ROWS[:2])["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    model.eval()
    third = slice(8 + 3, 8 + 3 + 5)
    assert torch.equal(logits(model)[third], base[third]) and not torch.equal(logits(model), base)
    assert torch.equal(logits(ap.active(model, None)), base)
    assert torch.equal(logits(ap.detach(model)), base)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules()), (
        "no hook is left behind"
    )


def test_training_data_without_an_invocation_is_refused(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No row is invoked: an error before anything is trained. Half of them are: a warning that counts them,
    and a pack.
    """
    rows = [{"prompt": f"w{at} w3 w4", "completion": "w9"} for at in (1, 2)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = {
        "model_name_or_path": str(tiny_llama),
        "train_file": str(tmp_path / "rows.jsonl"),
        "output_dir": str(tmp_path / "a"),
        "method": "alora",
        "r": 2,
        "max_steps": 1,
    }
    with pytest.raises(NothingToDo, match="acts in no row"):
        ap.train({**config, "alora_invocation_tokens": [70]})
    assert not (tmp_path / "a").exists()
    (pack,) = ap.train({**config, "alora_invocation_tokens": [6, 7]})
    assert pack.acts == Invoked((6, 7)) and "in 1 of 2 rows the adapter acts nowhere" in caplog.text
    assert len(pack.manifest.canary.input_ids[0]) == 9 + 2, "its first row is one that it acts in"


def test_it_stands_beside_a_prompt_and_a_lora(llama: Any) -> None:
    """Virtual tokens before a row do not move its positions: with a prompt and a LoRA active, rows equal
    themselves alone and unpadded.
    """
    model = llama
    for name in ("prompt", "lora", "activated"):
        moved(model, CONFIGS[name], name)
    ap.active(model, ["prompt", "lora", "activated"])
    found = logits(model, left=True)
    with torch.no_grad():
        alone = torch.cat([model(torch.tensor([row])).logits[0] for row in ROWS])
        without = torch.cat(
            [ap.active(model, ["prompt", "lora"])(torch.tensor([row])).logits[0] for row in ROWS]
        )
    np.testing.assert_allclose(found, alone, rtol=0, atol=CLOSE)
    assert torch.equal(alone[11:16], without[11:16]) and not torch.equal(alone[:8], without[:8])


# --- bundles


@pytest.fixture(scope="module")
def packs(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("positions")
    for name, config in CONFIGS.items():
        ap.save(
            moved(AutoModelForCausalLM.from_pretrained(tiny_llama).eval(), config, name),
            folder / name,
            base=tiny_llama,
        )
    return {name: folder / name for name in CONFIGS}


@pytest.mark.parametrize("mode", ["bank", "inputs"])
def test_a_bundle_acts_where_torch_does(
    mode: str, packs: dict[str, Path], tiny_llama: Path, tmp_path: Path
) -> None:
    """A ragged batch of every kind of row: logits and greedy tokens are those of torch on each row alone; a
    step on a cache is told.
    """
    ap.export(tiny_llama, list(packs.values()), tmp_path / mode, mode=mode)
    session = ap.Session(tmp_path / mode, "cpu")
    names: list[str | None] = ["activated", "ends", "activated", "prompt", None]
    given = pad(ROWS, 0, left=True)
    found, told = session.run(given, names)["logits"], session.generate(ROWS, names, max_new_tokens=6)
    for row, name, values, answer in zip(ROWS, names, found, told, strict=True):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
        if name is not None:
            ap.attach(model, ap.load(packs[name]))
        with torch.no_grad():
            np.testing.assert_allclose(
                values[-len(row) :], model(torch.tensor([row])).logits[0], rtol=0, atol=1e-4
            )
        tokens = model.generate(torch.tensor([row]), max_new_tokens=6, do_sample=False)[
            0, len(row) :
        ].tolist()
        assert list(answer.ids) == (tokens[: tokens.index(2)] if 2 in tokens else tokens)
    first = session.run(given, "activated")
    past = {
        key.replace("present.", "past_key_values."): value
        for key, value in first.items()
        if key.startswith("present.")
    }
    step = {
        "input_ids": np.full((5, 1), 4),
        "attention_mask": np.concatenate([given["attention_mask"], np.ones((5, 1), int)], 1),
        **past,
    }
    with pytest.raises(ConfigError, match="cache"):
        session.run(step, "activated")
    before = session.acting(given, ["activated"] * 5).any(axis=1)
    assert before.tolist() == [True, True, False, True, False]
    now = session.acting(
        {"input_ids": step["input_ids"], "attention_mask": np.ones((5, 1), int)}, ["activated"] * 5, before
    )
    more = session.run({**step, "adapter_positions": now}, "activated")["logits"][0, -1]
    model = ap.attach(AutoModelForCausalLM.from_pretrained(tiny_llama).eval(), ap.load(packs["activated"]))
    with torch.no_grad():
        np.testing.assert_allclose(
            more, model(torch.tensor([[*ROWS[0], 4]])).logits[0, -1], rtol=0, atol=1e-4
        )


def test_a_fold_leaves_nothing_of_adapters_that_act_at_positions(
    packs: dict[str, Path], tiny_llama: Path, pack_of: Callable[..., Path], tmp_path: Path
) -> None:
    """A pack folded into their bundle gives the graph that it gives folded into the base."""
    ap.export(tiny_llama, [packs["activated"]], tmp_path / "bank", in_place=False)
    ap.merge(tmp_path / "bank", [pack_of("llama", "gamma")], tmp_path / "merged")
    ap.export(tiny_llama, [pack_of("llama", "gamma")], tmp_path / "folded", mode="folded", in_place=False)
    found, wanted = (
        ap.Session(tmp_path / name, "cpu").run(pad(ROWS, 0, left=True))["logits"]
        for name in ("merged", "folded")
    )
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["bank", "inputs"])
def test_rows_keep_the_positions_of_their_adapter(
    mode: str, packs: dict[str, Path], tiny_llama: Path, tmp_path: Path
) -> None:
    """An adapter that acts in a part of each row only is unloaded after the first token: the rows go on as if
    it were there.
    """
    ap.export(tiny_llama, [packs["activated"], packs["ends"]], tmp_path / mode, mode=mode)
    session, names = ap.Session(tmp_path / mode, "cpu"), ["activated", "ends", "activated", "activated", None]
    expected = [answer.ids for answer in session.generate(ROWS, names, max_new_tokens=12)]

    def unload(row: int, token: int, text: str) -> None:
        for name in {"activated", "ends"} & set(session.adapters):
            session.unload(name)

    assert [
        answer.ids for answer in session.generate(ROWS, names, max_new_tokens=12, emit=unload)
    ] == expected
    assert session.adapters == []


def test_what_cannot_act_at_positions_says_so(
    packs: dict[str, Path],
    pack_of: Callable[[str, str], Path],
    bundle_of: Callable[[str, str], Path],
    tiny_llama: Path,
    tmp_path: Path,
) -> None:
    """Merge, folded export, composition and files without a place for it; a graph that does not ask; nothing
    is left behind.
    """
    activated = packs["activated"]
    for refused in (
        lambda out: ap.merge(tiny_llama, [activated], out),
        lambda out: ap.export(tiny_llama, [activated], out, mode="folded"),
        lambda out: ap.compose([activated, pack_of("llama", "alpha")], out=out),
        lambda out: ap.convert(activated, out, to="gguf", base=tiny_llama),
        lambda out: ap.convert(activated, out, to="onnx_adapter"),
    ):
        with pytest.raises(Unsupported, match="position"):
            refused(tmp_path / "out")
        assert not (tmp_path / "out").exists()
    session = ap.Session(bundle_of("llama", "bank"), "cpu")
    with pytest.raises(Unsupported, match="does not ask for"):
        session.load(activated)
    assert "activated" not in session.adapters


def test_what_has_no_positions_is_refused(llama: Any, tiny_llama: Path) -> None:
    """Embeddings for ids, other masks, layers outside of a pass, models without ids, sites that do not agree,
    and values out of range.
    """
    given = batch()
    plain = torch.nn.Sequential(torch.nn.Linear(4, 3))
    with pytest.raises(Unsupported, match="takes token ids"):
        ap.adapt(plain, CONFIGS["activated"])
    assert type(plain[0]) is torch.nn.Linear and not plain._forward_pre_hooks
    both = BartModel(
        BartConfig(
            vocab_size=20,
            d_model=8,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=1,
            decoder_ffn_dim=8,
            decoder_attention_heads=1,
            encoder_ffn_dim=8,
        )
    )
    with pytest.raises(Unsupported, match="an encoder and a decoder"):
        ap.adapt(both, CONFIGS["activated"])
    model = moved(llama, CONFIGS["activated"])
    with pytest.raises(Unsupported, match="this pass has none"):
        model(
            inputs_embeds=model.get_input_embeddings()(given["input_ids"]),
            attention_mask=given["attention_mask"],
        )
    with pytest.raises(Unsupported, match="which tokens are padding"):
        model(given["input_ids"], attention_mask=torch.zeros(5, 1, 8, 8))
    with pytest.raises(Unsupported, match="pass of the whole model"):
        model.model.layers[0].mlp.down_proj(torch.zeros(5, 8, 48))
    pack = ap.save(model, None, base=tiny_llama)
    first, second, *_ = pack.adapters()
    torn = build(
        "torn",
        pack.method,
        {
            first.site: (first.config, first.params),
            second.site: (ap.ALoRA(r=3, alpha=5, alora_invocation_tokens=(9,)), second.params),
        },
        task=pack.manifest.task,
        base=pack.manifest.base,
    )
    with pytest.raises(FormatError, match="same positions"):
        _ = torn.acts
    with pytest.raises(AdapterpackError, match="same positions"):
        ap.attach(AutoModelForCausalLM.from_pretrained(tiny_llama), torn)
    for wrong in ((), (1.5,), (-1,), tuple(range(1025))):
        with pytest.raises(ValueError, match="alora_invocation_tokens"):
            ap.ALoRA(alora_invocation_tokens=wrong)
    for wrong in ("", "f0", "x1", "f1+f2", "first", "f1l", "f1l1", "+l1"):
        with pytest.raises(ValueError, match="positions"):
            ap.LoReFT(positions=wrong)
