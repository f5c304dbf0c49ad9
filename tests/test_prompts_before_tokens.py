"""Prompts in graphs without a decoder's cache of their own text: before the rows of encoders and of
encoder-decoders, and in the cache of a decoder behind an encoder. Ragged padded batches that mix them with a
LoRA and the base, against transformers and PEFT row by row.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from families import FAMILIES
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertModel,
)

import adapterpack as ap
from adapterpack.errors import ConfigError, Unsupported
from adapterpack.runtime.engine.encoder_engine import EncoderEngine
from adapterpack.runtime.padding import pad

pytestmark = pytest.mark.filterwarnings("ignore")
CLOSE = 1e-4
"""float32 logits of about 5 on two runtimes."""
ROWS: list[list[int]] = [
    [5, 6, 7, 30, 31],
    [8, 9],
    [10, 11, 12, 13, 14, 15, 16],
    [60],
    [20, 21, 22],
    [33, 34, 35, 36],
]
BATCH = pad(ROWS, 0, left=False)
LABELS = 3


def shaken(model: Any, seed: int) -> Any:
    """The model with random numbers in what is trained."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=noise))
    return model.eval()


def of_peft(base: Any, config: Any, folder: Path, seed: int) -> Any:
    """PEFT's model, moved, and in that folder."""
    model = shaken(peft.get_peft_model(base, config), seed)
    model.save_pretrained(folder)
    return model


def outputs_of(model: Any, row: list[int], **more: Any) -> Any:
    with torch.no_grad():
        return model(
            input_ids=torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.long), **more
        )


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of 64 positions with a head of three labels."""
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("encoder") / "bert"
    config = BertConfig(
        vocab_size=96,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        num_labels=LABELS,
        max_position_embeddings=64,
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifiers(
    encoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str | None, Any], dict[str, Path]]:
    """Models by the name of their adapter, and the adapters: two of PEFT's, which pool a virtual token, one
    of ours, which pools the row's first, and a LoRA.
    """
    folder = tmp_path_factory.mktemp("classifiers")

    def base() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(encoder).eval()

    models: dict[str | None, Any] = {None: base()}
    for seed, (name, config) in enumerate(
        {
            "prompt": peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5),
            "encoded": peft.PromptEncoderConfig(
                task_type="SEQ_CLS", num_virtual_tokens=3, encoder_hidden_size=8
            ),
            "lora": peft.LoraConfig(task_type="SEQ_CLS", r=3, target_modules=["query", "dense"]),
        }.items()
    ):
        models[name] = of_peft(base(), config, folder / name, seed)
    models["own"] = shaken(ap.adapt(base(), ap.PromptTuning(num_virtual_tokens=2), "own"), 9)
    ap.save(models["own"], folder / "own", base=encoder)
    return models, {name: folder / name for name in models if name is not None}


NAMES: list[str | None] = ["prompt", None, "own", "encoded", "lora", "prompt"]


@pytest.fixture(scope="module")
def bank(encoder: Path, classifiers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bank") / "bundle"
    ap.export(encoder, list(classifiers[1].values()), folder, slots=7)
    return folder


def require_rows(
    found: np.ndarray, names: list[str | None], models: Mapping[str | None, Any], rows: list[list[int]] = ROWS
) -> None:
    for row, name, values in zip(rows, names, found, strict=True):
        wanted = outputs_of(models[name], row).logits[0].numpy()
        np.testing.assert_allclose(values[: len(wanted)], wanted, rtol=0, atol=CLOSE, err_msg=str(name))


def test_a_classifiers_rows_equal_torch(bank: Path, classifiers: Any) -> None:
    """Prompts of three lengths and both kinds of pooling, a LoRA and the base, in one pass and one by one."""
    session = ap.Session(bank, "cpu")
    together = session.run(BATCH, NAMES)["logits"]
    require_rows(together, NAMES, classifiers[0])
    for row, name, values in zip(ROWS, NAMES, together, strict=True):
        alone = session.run({"input_ids": np.array([row])}, name)["logits"][0]
        np.testing.assert_allclose(alone, values, rtol=0, atol=1e-5)
    apart = [session.run(BATCH, name)["logits"] for name in ("prompt", None)]
    assert np.abs(apart[0] - apart[1])[:, :LABELS].max() > 1e-2, "the prompt does something"


def test_a_classifiers_rows_equal_torch_with_slots_as_inputs(
    encoder: Path, classifiers: Any, tmp_path: Path
) -> None:
    """One adapter a run; the base's rows have no position more than before."""
    models, packs = classifiers
    ap.export(encoder, [packs["prompt"], packs["own"], packs["lora"]], tmp_path / "bundle", mode="inputs")
    names: list[str | None] = ["prompt", None, "own", "prompt", "lora", "own"]
    require_rows(ap.Session(tmp_path / "bundle", "cpu").run(BATCH, names)["logits"], names, models)


def test_prompts_are_loaded_into_a_running_bank(
    bank: Path, classifiers: Any, encoder: Path, tmp_path: Path
) -> None:
    """By the session and by the engine; a longer prompt than the bank has room for, and keys and values, are
    refused.
    """
    base = AutoModelForSequenceClassification.from_pretrained(encoder)
    new = shaken(ap.adapt(base, ap.PromptTuning(num_virtual_tokens=4), "new"), 12)
    models = {**classifiers[0], "new": new}
    ap.save(new, tmp_path / "new", base=encoder)
    session, engine = ap.Session(bank, "cpu"), EncoderEngine(bank, "cpu")
    session.load(tmp_path / "new")
    names: list[str | None] = ["new", None, "own", "encoded", "new", "prompt"]
    require_rows(session.run(BATCH, names)["logits"], names, models)
    loaded = ap.load(tmp_path / "new")
    requests = [
        engine.add(row, loaded if name == "new" else name) for row, name in zip(ROWS, names, strict=True)
    ]
    events = {event.request: event.result for event in iter_events(engine)}
    for number, row, name in zip(requests, ROWS, names, strict=True):
        wanted = torch.softmax(outputs_of(models[name], row).logits[0], 0).max().item()
        assert max(events[number]["scores"].values()) == pytest.approx(wanted, abs=CLOSE)
    long = ap.adapt(
        AutoModelForSequenceClassification.from_pretrained(encoder),
        ap.PromptTuning(num_virtual_tokens=6),
        "long",
    )
    ap.save(long, tmp_path / "long", base=encoder)
    with pytest.raises(Unsupported, match="does not fit its slot"):
        session.load(tmp_path / "long")


def iter_events(engine: EncoderEngine) -> Any:
    while engine.busy:
        yield from engine.step()


def test_virtual_tokens_take_room_of_every_row(bank: Path) -> None:
    """Of 64 positions a bank keeps five for its longest prompt."""
    session, engine = ap.Session(bank, "cpu"), EncoderEngine(bank, "cpu")
    session.run({"input_ids": np.array([[5] * 59])}, "prompt")
    with pytest.raises(ConfigError, match="at most 64 tokens, found 65, of which 5 are the adapter's prompt"):
        session.run({"input_ids": np.array([[5] * 60])})
    with pytest.raises(ConfigError, match="found 65, of which 5"):
        engine.add([5] * 60)


def test_a_quantized_classifier_keeps_its_prompts(bank: Path, tmp_path: Path) -> None:
    """int8 weights: within a tenth of the largest logit of the float bundle's."""
    ap.quantize(bank, tmp_path / "small", scheme="int8")
    exact, small = (
        ap.Session(folder, "cpu").run(BATCH, NAMES)["logits"][:, :LABELS]
        for folder in (bank, tmp_path / "small")
    )
    assert np.abs(small - exact).max() < 0.1 * np.abs(exact).max()


@pytest.mark.long
def test_labels_of_tokens_are_of_a_rows_own_tokens(encoder: Path, tmp_path: Path) -> None:
    """PEFT's prompts on a token classifier: as many labels as tokens, those of PEFT behind its virtual
    ones.
    """
    AutoModelForTokenClassification.from_pretrained(encoder).save_pretrained(tmp_path / "base")

    def base() -> Any:
        return AutoModelForTokenClassification.from_pretrained(tmp_path / "base").eval()

    model = of_peft(
        base(), peft.PromptTuningConfig(task_type="TOKEN_CLS", num_virtual_tokens=4), tmp_path / "prompt", 3
    )
    ap.export(tmp_path / "base", [tmp_path / "prompt"], tmp_path / "bundle")
    names: list[str | None] = ["prompt", None, None, "prompt", "prompt", None]
    found = ap.Session(tmp_path / "bundle", "cpu").run(BATCH, names)["logits"]
    assert found.shape == (*BATCH["input_ids"].shape, LABELS)
    plain = base()
    for row, name, values in zip(ROWS, names, found, strict=True):
        wanted = outputs_of(model if name else plain, row).logits[0, 4 if name else 0 :].numpy()
        np.testing.assert_allclose(values[: len(row)], wanted, rtol=0, atol=CLOSE, err_msg=str(name))


@pytest.mark.long
def test_embeddings_are_pooled_over_a_rows_own_tokens(encoder: Path, tmp_path: Path) -> None:
    """PEFT's prompts on a bare encoder: the mean of its states behind the virtual ones; in halves, too."""
    BertModel.from_pretrained(encoder).save_pretrained(tmp_path / "base")
    config = peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3)
    model = of_peft(BertModel.from_pretrained(tmp_path / "base").eval(), config, tmp_path / "prompt", 4)
    plain = BertModel.from_pretrained(tmp_path / "base").eval()
    for dtype, close in (("float32", CLOSE), ("float16", 2e-2)):
        ap.export(tmp_path / "base", [tmp_path / "prompt"], tmp_path / dtype, pooling="mean", dtype=dtype)
        engine = EncoderEngine(tmp_path / dtype, "cpu")
        names = ["prompt", None, "prompt", None, "prompt", "prompt"]
        requests = [engine.add(row, name) for row, name in zip(ROWS, names, strict=True)]
        events = {event.request: event.result for event in iter_events(engine)}
        for number, row, name in zip(requests, ROWS, names, strict=True):
            states = outputs_of(model if name else plain, row).last_hidden_state[0, 3 if name else 0 :]
            np.testing.assert_allclose(
                events[number]["embedding"], states.mean(0).numpy(), rtol=0, atol=close
            )


WANTED = [0, 4, 9, 12]
SEQ2SEQ: dict[str, Any] = {
    "prompt": lambda targets: peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5),
    "encoded": lambda targets: peft.PromptEncoderConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3, encoder_hidden_size=8
    ),
    "prefix": lambda targets: peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4),
    "lora": lambda targets: peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=3, target_modules=targets),
}
TARGETS = {"t5": ["q", "v"], "bart": ["q_proj", "v_proj"]}
MIXED: list[str | None] = ["prompt", None, "prefix", "encoded", "lora", "prefix"]
SHORT = [[token % 30 + 2 for token in row] for row in ROWS]


def seq2seq(family: str, folder: Path) -> dict[str | None, Any]:
    """Models by the name of their adapter; those are in the folder, and the base, too."""
    FAMILIES[family].build().save_pretrained(folder / "base")
    models: dict[str | None, Any] = {None: FAMILIES[family].load(folder / "base").eval()}
    for seed, (name, config) in enumerate(SEQ2SEQ.items()):
        models[name] = of_peft(
            FAMILIES[family].load(folder / "base").eval(), config(TARGETS[family]), folder / name, seed + 20
        )
    return models


def require_answers(session: ap.Session, models: Mapping[str | None, Any], start: int) -> None:
    """Logits of one pass, of further passes on its cache, and greedy tokens, of a mixed batch: those of torch
    row by row.
    """
    batch = pad(SHORT, 0, left=False)
    wanted = [
        outputs_of(models[name], row, decoder_input_ids=torch.tensor([WANTED])).logits[0].numpy()
        for row, name in zip(SHORT, MIXED, strict=True)
    ]
    found = session.run({**batch, "decoder_input_ids": np.array([WANTED] * len(SHORT))}, MIXED)
    np.testing.assert_allclose(found["logits"], np.stack(wanted), rtol=0, atol=CLOSE)
    encoded = {name: array for name, array in found.items() if name.startswith("encoder.")}
    outputs: dict[str, Any] = {}
    for token, place in zip(WANTED, range(len(WANTED)), strict=True):  # the same tokens one by one
        cache = {
            name.replace("present", "past_key_values"): array
            for name, array in outputs.items()
            if name.startswith("present")
        }
        outputs = session.run(
            {
                "decoder_input_ids": np.full((len(SHORT), 1), token),
                "attention_mask": batch["attention_mask"],
                **encoded,
                **cache,
            },
            MIXED,
        )
        np.testing.assert_allclose(outputs["logits"][:, 0], np.stack(wanted)[:, place], rtol=0, atol=CLOSE)
    answers = session.generate(SHORT, MIXED, max_new_tokens=4, ignore_eos=True)
    for row, name, answer in zip(SHORT, MIXED, answers, strict=True):
        ids = [start]
        for _ in range(4):  # the longhand way: no cache, one row
            ids.append(
                int(
                    outputs_of(models[name], row, decoder_input_ids=torch.tensor([ids]))
                    .logits[0, -1]
                    .argmax()
                )
            )
        assert answer.ids == tuple(ids[1:]), name


@pytest.mark.long
@pytest.mark.parametrize(("family", "mode"), [("t5", "bank"), ("bart", "inputs")])
def test_an_encoder_decoders_rows_equal_peft(family: str, mode: str, tmp_path: Path) -> None:
    """Embeddings before what the encoder reads, keys and values in the decoder's cache, a LoRA and the base,
    by the ordinary graphs.
    """
    models = seq2seq(family, tmp_path)
    packs = [tmp_path / name for name in SEQ2SEQ]
    ap.export(
        tmp_path / "base",
        packs,
        tmp_path / "bundle",
        mode=mode,
        task="text2text-generation",
        in_place=False,
        frontend="transformers",
    )
    require_answers(
        ap.Session(tmp_path / "bundle", "cpu"), models, models[None].config.decoder_start_token_id
    )


@pytest.mark.long
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_the_engine_answers_as_peft_does(family: str, tmp_path: Path) -> None:
    """The same rows by the engine's graph; and prompts that are loaded while it is open."""
    models = seq2seq(family, tmp_path)
    packs = [tmp_path / name for name in ("prompt", "lora")]
    ap.export(tmp_path / "base", packs, tmp_path / "bundle", task="text2text-generation", slots=5)
    session = ap.Session(tmp_path / "bundle", "cpu")
    assert session.bundle.decoder
    for name in ("encoded", "prefix"):
        session.load(tmp_path / name)
    require_answers(session, models, models[None].config.decoder_start_token_id)


@pytest.mark.long
def test_what_has_no_place_in_a_graph_is_said(
    encoder: Path, bank: Path, tmp_path: Path, classifiers: Any
) -> None:
    """Keys and values on a classifier, a bundle that was made without prompts, and folding."""
    pack = of_peft(
        AutoModelForSequenceClassification.from_pretrained(encoder),
        peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2),
        tmp_path / "prefix",
        1,
    )
    assert pack is not None
    with pytest.raises(Unsupported, match=r"the graph of this task has none.*train virtual embeddings"):
        ap.export(encoder, [tmp_path / "prefix"], tmp_path / "bundle", task="text-classification")
    with pytest.raises(Unsupported, match="neither a cache nor room"):
        ap.Session(bank, "cpu").load(tmp_path / "prefix")
    with pytest.raises(Unsupported, match="does not act on weights"):
        ap.export(encoder, [classifiers[1]["prompt"]], tmp_path / "bundle", mode="folded")
    ap.export(encoder, [classifiers[1]["lora"]], tmp_path / "bundle", slots=3)
    with pytest.raises(Unsupported, match="export the bundle again with this adapter among the packs"):
        ap.Session(tmp_path / "bundle", "cpu").load(classifiers[1]["prompt"])
