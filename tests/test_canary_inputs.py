"""Canaries of models that take images, speech, texts beside images, or ids for an encoder and others for a
decoder: recorded when packed, replayed when attached.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from every_family.tiny import make_base
from msgspec.structs import replace
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    BertConfig,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    ConvNextConfig,
    ConvNextModel,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    ResNetConfig,
    ResNetModel,
    Siglip2Config,
    Siglip2Model,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5Model,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
    WhisperModel,
)

from adapterpack import LoRA, Pack, adapt, attach, load, save, validate
from adapterpack.bundle.manifest import read_bundle
from adapterpack.errors import AdapterpackError, BaseMismatch, NothingToDo, ParityError
from adapterpack.exporting.tracing.torch_parts import CausalDecoder
from adapterpack.manifest import manifest as m
from adapterpack.manifest.structs import Canary, Features, Pixels
from adapterpack.manifest.synthetic_inputs import make_row
from adapterpack.pack import canary
from adapterpack.runtime.canary import not_replayable
from adapterpack.tasks.task import get_task
from adapterpack.torch_adapters.canaries.canary import verify_canary
from adapterpack.torch_adapters.canaries.inputs import inputs_of, misfit
from adapterpack.torch_adapters.layers.active import adapter_names
from adapterpack.torch_adapters.models.load import load_model
from adapterpack.torch_adapters.unused import unused_layers

SAME = 1e-5
"""Of outputs of size 0.1 to 10; the same passes in the same process differ by nothing, in another batch
layout by about 1e-6.
"""
_VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "image_size": (8, 12),
    "patch_size": 4,
}
_T5 = {
    "vocab_size": 53,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 20,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
_BART = {
    "vocab_size": 53,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 20,
    "max_position_embeddings": 32,
}
_WHISPER = {
    **{key: value for key, value in _BART.items() if "position" not in key},
    "num_mel_bins": 6,
    "max_source_positions": 10,
    "max_target_positions": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
}
_SEES = {**_VIT, "image_size": 8}
_TEXT = {
    "vocab_size": 53,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}

MODELS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "vit": (lambda: ViTForImageClassification(ViTConfig(**_VIT, num_labels=5)), ("q_proj", "v_proj")),
    "vit states": (lambda: ViTModel(ViTConfig(**_VIT, num_channels=1)), ("q_proj", "v_proj")),
    "convnext": (
        lambda: ConvNextModel(
            ConvNextConfig(image_size=32, hidden_sizes=[8, 12], depths=[1, 1], num_stages=2)
        ),
        ("pwconv1",),
    ),
    "t5": (lambda: T5ForConditionalGeneration(T5Config(**_T5)), ("q", "v")),
    "t5 states": (lambda: T5Model(T5Config(**_T5)), ("q", "v")),
    "bart": (lambda: BartForConditionalGeneration(BartConfig(**_BART)), ("q_proj", "v_proj")),
    "bart classifier": (
        lambda: BartForSequenceClassification(BartConfig(**_BART, num_labels=3)),
        ("q_proj", "v_proj"),
    ),
    "two berts": (
        lambda: EncoderDecoderModel(
            EncoderDecoderConfig.from_encoder_decoder_configs(
                BertConfig(vocab_size=40, **_BERT), BertConfig(vocab_size=30, **_BERT)
            )
        ),
        ("query", "value"),
    ),
    "captions": (
        lambda: VisionEncoderDecoderModel(
            VisionEncoderDecoderConfig.from_encoder_decoder_configs(
                ViTConfig(**_VIT), BertConfig(vocab_size=30, **_BERT)
            )
        ),
        ("query", "value"),
    ),
    "whisper": (lambda: WhisperForConditionalGeneration(WhisperConfig(**_WHISPER)), ("q_proj", "v_proj")),
    "whisper states": (lambda: WhisperModel(WhisperConfig(**_WHISPER)), ("q_proj", "v_proj")),
    **{
        name: (
            lambda: CLIPModel(CLIPConfig(text_config=_TEXT, vision_config=_SEES, projection_dim=12)),
            targets,
        )
        for name, targets in (
            ("clip", ("q_proj", "fc1")),
            ("clip texts", ("text_projection",)),
            ("clip images", ("visual_projection",)),
        )
    },
    "llava": (
        lambda: LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=CLIPVisionConfig(**_SEES),
                text_config=LlamaConfig(**_TEXT),
                image_token_id=7,
                vision_feature_layer=-1,
            )
        ),
        ("q_proj", "linear_1"),
    ),
}
IMAGES = {"vit", "vit states", "convnext", "captions"}
BESIDE = {"clip", "clip texts", "clip images", "llava"}
SPEECH = {"whisper", "whisper states"}


def fresh(kind: str) -> Any:
    """The same numbers every time, larger than a fresh model's, so that layers matter."""
    torch.manual_seed(0)
    model = MODELS[kind][0]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
            elif "layer_scale" in name:
                parameter.fill_(0.5)
    return model.train()


@torch.no_grad()
def shaken(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def packed(kind: str, out: Path | None = None) -> Pack:
    return save(shaken(adapt(fresh(kind), LoRA(r=3, targets=MODELS[kind][1]), "p")), out)


def changed(pack: Pack, change: Callable[[np.ndarray], np.ndarray]) -> Pack:
    """The pack with other B, and the canary of the right ones."""
    return dataclasses.replace(
        pack,
        tensors={name: change(array) if "lora_B" in name else array for name, array in pack.tensors.items()},
    )


@pytest.mark.parametrize("kind", MODELS)
def test_each_fault_has_its_error(kind: str, tmp_path: Path) -> None:
    """Written, read and attached it passes; on a base changed in memory, with no effect, or with other
    numbers, it says which.
    """
    pack = packed(kind, tmp_path / "p")
    recorded = pack.manifest.canary
    assert recorded is not None
    assert (recorded.pixels is not None) == (kind in IMAGES | BESIDE)
    assert (recorded.features is not None) == (kind in SPEECH)
    assert (recorded.input_ids == ()) == (kind in IMAGES | SPEECH)
    assert validate(tmp_path / "p", full=True).findings == ()
    model = attach(fresh(kind), load(tmp_path / "p"))
    assert all(module.training for module in model.modules())
    assert verify_canary(model, pack, "p") <= SAME
    for change, error in ((np.zeros_like, NothingToDo), (lambda B: B * np.float32(1.5), ParityError)):
        with pytest.raises(error, match="canary"):
            attach(fresh(kind), changed(pack, change))
    with torch.no_grad():
        other = attach(fresh(kind), pack)
        weight = next(
            parameter
            for name, parameter in other.named_parameters()
            if "adapter" not in name and parameter.ndim > 1
        )
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(9)))
    with pytest.raises(BaseMismatch, match="canary"):
        verify_canary(other, pack)


def test_what_is_recorded_of_an_image_classifier_and_a_decoder() -> None:
    """Logits that the bare model gives for the very inputs that the recipe and the ids stand for."""
    recorded = packed("vit").manifest.canary
    assert recorded is not None
    assert recorded.pixels == Pixels(canary.SEED, (2, 3, 8, 12))
    pixels = torch.from_numpy(np.concatenate([make_row(recorded.pixels, number) for number in range(2)]))
    with torch.no_grad():
        logits = fresh("vit").eval()(pixel_values=pixels).logits.numpy()
    for row, kept in zip(logits, recorded.base, strict=True):
        np.testing.assert_allclose(row[kept["ids"]], kept["logits"], atol=SAME)
    recorded = packed("t5").manifest.canary
    assert recorded is not None
    assert recorded.decoder_input_ids is not None
    assert [row[-1] for row in recorded.input_ids] == [1, 1], "T5's end"
    assert [row[0] for row in recorded.decoder_input_ids] == [0, 0], "T5's start"
    with torch.no_grad():
        for ids, decoder, kept in zip(
            recorded.input_ids, recorded.decoder_input_ids, recorded.base, strict=True
        ):
            row = (
                fresh("t5")
                .eval()(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([decoder]))
                .logits[0, -1]
                .numpy()
            )
            assert kept["ids"] == list(np.argsort(-row)[:8])
            np.testing.assert_allclose(row[kept["ids"]], kept["logits"], atol=SAME)


def test_what_is_recorded_of_speech_and_of_images_beside_texts() -> None:
    """Whisper: logits of the decoder's last token. CLIP: eight components of each embedding. LLaVA: logits
    behind a text that begins with as many image tokens as the model has positions, of which the manifest
    holds one.
    """
    whisper, clip, llava = (packed(kind).manifest.canary for kind in ("whisper", "clip", "llava"))
    assert whisper is not None and clip is not None and llava is not None
    assert whisper.features == Features(canary.SEED, (2, 6, 20))
    assert whisper.decoder_input_ids is not None and [row[0] for row in whisper.decoder_input_ids] == [
        3,
        3,
    ], "Whisper's start"
    assert [row[-1] for row in clip.input_ids] == [2, 2], "CLIP's end, where its text is read off"
    assert [row.count(7) for row in llava.input_ids] == [1, 1]
    with torch.no_grad():
        for number in range(2):
            heard = {
                "input_features": torch.from_numpy(make_row(whisper.features, number)),
                "decoder_input_ids": torch.tensor([whisper.decoder_input_ids[number]]),
            }
            logits = fresh("whisper").eval()(**heard).logits[0, -1].numpy()
            np.testing.assert_allclose(
                logits[whisper.base[number]["ids"]], whisper.base[number]["logits"], atol=SAME
            )
            seen = {
                "input_ids": torch.tensor([clip.input_ids[number]]),
                "pixel_values": torch.from_numpy(make_row(clip.pixels, number)),
            }
            output = fresh("clip").eval()(**seen)
            both = np.concatenate([output.text_embeds[0].numpy(), output.image_embeds[0].numpy()])
            places = clip.base[number]["ids"]
            assert (len(places), sum(place < 12 for place in places)) == (16, 8)
            np.testing.assert_allclose(both[places], clip.base[number]["logits"], atol=SAME)
            ids = [each for one in llava.input_ids[number] for each in ([7] * 4 if one == 7 else [one])]
            seen = {
                "input_ids": torch.tensor([ids]),
                "pixel_values": torch.from_numpy(make_row(llava.pixels, number)),
            }
            logits = fresh("llava").eval()(**seen).logits[0, -1].numpy()
            np.testing.assert_allclose(
                logits[llava.base[number]["ids"]], llava.base[number]["logits"], atol=SAME
            )


def test_foreign_canaries_of_speech_and_of_images_beside_texts_are_not_run() -> None:
    """What such a model does not take is named before anything is made; a text alone is a canary of a model
    that may see, too.
    """
    large = Features(1, (2, 65536, 65536))
    for kind, change, reason in (
        ("whisper", {"features": Features(1, (2, 6, 3000))}, "speech of (6, 3000)"),
        ("whisper", {"features": large}, "more than 16777216 numbers"),
        ("whisper", {"features": None, "input_ids": ((1,), (2,))}, "it has no speech"),
        ("whisper", {"decoder_input_ids": None}, "no ids for a decoder"),
        ("clip", {"pixels": None}, "it has no images"),
        ("clip", {"input_ids": ()}, "it has no token ids"),
        ("clip", {"input_ids": ((1,), (53,))}, "does not take its token ids"),
        ("llava", {"input_ids": ((7, 7), (7,))}, "one image token (7) each"),
        ("llava", {"input_ids": ((1,), (7,))}, "one image token (7) each"),
        ("llava", {"pixels": Pixels(1, (2, 3, 12, 12))}, "images of (3, 12, 12)"),
        ("bart", {"features": Features(1, (2, 6, 20))}, "speech of (6, 20)"),
    ):
        pack = packed(kind)
        assert pack.manifest.canary is not None
        foreign = replace(pack.manifest.canary, **change)
        with pytest.raises(NothingToDo, match=re.escape(reason)):
            verify_canary(
                fresh(kind), dataclasses.replace(pack, manifest=replace(pack.manifest, canary=foreign))
            )
    assert misfit(fresh("llava"), Canary(((1, 2),), ({},), ({},), 1.0)) is None


def test_a_model_that_wants_more_than_images_is_packed_without(caplog: pytest.LogCaptureFixture) -> None:
    """LLaVA-NeXT asks for the images' own sizes beside their tiles: the log says that there is no canary, and
    the adapter is saved.
    """
    torch.manual_seed(0)
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**_SEES),
        text_config=LlamaConfig(**_TEXT),
        image_token_id=7,
        vision_feature_layer=-1,
        image_grid_pinpoints=[[8, 8]],
    )
    pack = save(adapt(LlavaNextForConditionalGeneration(config), LoRA(r=2, targets=("q_proj",)), "n"), None)
    assert pack.manifest.canary is None
    assert "does not run on input_ids, pixel_values" in caplog.text


def test_two_towers_whose_images_have_sizes_of_their_own_are_packed_without() -> None:
    """SigLIP 2 takes patches, whose number is each image's own: texts alone are no input of two towers."""
    torch.manual_seed(0)
    config = Siglip2Config(
        text_config={**_TEXT, "projection_size": 16}, vision_config={**_BERT, "num_patches": 9}
    )
    assert (
        save(adapt(Siglip2Model(config), LoRA(r=2, targets=("q_proj",)), "n"), None).manifest.canary is None
    )


@pytest.mark.parametrize("kind", ["vit", "t5", "whisper", "clip", "llava"])
def test_half_precision(kind: str, tmp_path: Path) -> None:
    """A float32 canary passes in bfloat16, where images are rounded too; one without effect is seen there."""
    fresh(kind).save_pretrained(tmp_path / "base")
    model_of = type(fresh(kind)).from_pretrained
    pack = save(shaken(adapt(model_of(tmp_path / "base"), LoRA(r=3, targets=MODELS[kind][1]), "p")), None)
    assert pack.manifest.canary is not None
    assert verify_canary(attach(model_of(tmp_path / "base", dtype=torch.bfloat16), pack), pack) > 1e-4
    with pytest.raises(NothingToDo):
        attach(model_of(tmp_path / "base", dtype=torch.bfloat16), changed(pack, np.zeros_like))
    half = save(
        shaken(
            adapt(model_of(tmp_path / "base", dtype=torch.bfloat16), LoRA(r=3, targets=MODELS[kind][1]), "p")
        ),
        None,
    )
    assert half.manifest.canary is not None
    assert half.manifest.canary.dtype == "bfloat16"
    assert verify_canary(attach(model_of(tmp_path / "base"), half), half) > 1e-4


def test_pixels_are_the_same_numbers_everywhere() -> None:
    """Against the generator written out with Python's own whole numbers; exact in float32, uniform, and other
    for every seed.
    """
    recipe, word = Pixels(2**32 - 1, (3, 2, 5, 7)), 2**64 - 1

    def expected(state: int) -> float:
        mixed = (state + 1) * 0x9E3779B97F4A7C15 & word
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & word
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & word
        return ((mixed ^ mixed >> 31) >> 40) / 2**23 - 1

    for number in range(3):
        row = make_row(recipe, number)
        assert (row.shape, row.dtype) == ((1, 2, 5, 7), np.float32)
        assert row.ravel().tolist() == [expected((recipe.seed << 32) + number * 70 + i) for i in range(70)]
    many = make_row(Pixels(1, (1, 3, 100, 100)), 0)
    assert -1 <= many.min() < -0.999 < 0.999 < many.max() < 1
    assert abs(many.mean()) < 0.02, "of 30000 numbers of variance 1/3 the mean strays by 0.0033"
    assert abs(many.var() - 1 / 3) < 0.01
    assert not np.array_equal(many, make_row(Pixels(2, (1, 3, 100, 100)), 0))


def test_a_model_that_takes_other_inputs_is_not_asked(caplog: pytest.LogCaptureFixture) -> None:
    """Another size of image, or a canary that a foreign manifest made impossible: left out and said, never
    run, nothing allocated.
    """
    pack = packed("vit")
    recorded = pack.manifest.canary
    assert recorded is not None

    def holding(**change: Any) -> Pack:
        return dataclasses.replace(pack, manifest=replace(pack.manifest, canary=replace(recorded, **change)))

    for change, reason in (
        ({"pixels": Pixels(1, (2, 3, 2048, 2048))}, "images of (3, 2048, 2048)"),
        ({"pixels": Pixels(1, (2048, 3, 8, 12))}, "not one to one"),
        ({"pixels": Pixels(1, (2, 3, 2048, 4096))}, "more than 16777216 numbers"),
        ({"features": Features(1, (2, 80, 3000))}, "speech of (80, 3000)"),
        ({"input_ids": ((1,), (2,))}, "does not take its token ids"),
        ({"pixels": None}, "not one to one"),
        ({"pixels": None, "input_ids": ((1,), (2,))}, "it has no images"),
        ({"decoder_input_ids": ((1,), (2,))}, "it has ids for a decoder"),
    ):
        caplog.clear()
        with caplog.at_level("INFO"):
            model = attach(fresh("vit"), holding(**change))
        assert reason in caplog.text
        with pytest.raises(NothingToDo, match="cannot be replayed"):
            verify_canary(model, holding(**change))
    ids = packed("bart").manifest.canary
    assert ids is not None
    pack = packed("t5")
    for canary_of, reason in (
        (replace(ids, decoder_input_ids=None), "no ids for a decoder"),
        (replace(ids, decoder_input_ids=((1, 53), (1,))), "decoder does not take"),
    ):
        foreign = dataclasses.replace(pack, manifest=replace(pack.manifest, canary=canary_of))
        with pytest.raises(AdapterpackError, match=reason):
            verify_canary(attach(fresh("t5"), foreign), foreign)


def test_models_that_have_no_canary() -> None:
    """One that hides parts of an image by chance even when evaluated, one whose images are larger than a
    manifest may ask for, and one whose config does not name a size: packed without.
    """
    small = {
        "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 20,
    }
    torch.manual_seed(0)
    masked = ViTMAEForPreTraining(ViTMAEConfig(**{**_VIT, "image_size": 8}, **small))
    huge = ViTModel(ViTConfig(**{**_VIT, "image_size": 4096, "patch_size": 2048}))
    sizeless = ResNetModel(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    )
    for model, targets in ((masked, ("q_proj",)), (huge, ("q_proj",)), (sizeless, ("convolution",))):
        pack = save(adapt(model, LoRA(r=2, targets=targets), "v"), None)
        assert pack.manifest.canary is None
        assert adapter_names(model) == ["v"]


def test_an_encoder_alone_has_a_canary_of_ids() -> None:
    """The encoder of an encoder-decoder is given no ids for a decoder."""
    torch.manual_seed(0)
    recorded = save(
        adapt(T5EncoderModel(T5Config(**_T5)), LoRA(r=2, targets=("q",)), "e"), None
    ).manifest.canary
    assert recorded is not None
    assert recorded.decoder_input_ids is None


def test_a_model_that_could_hear_is_asked_texts_where_it_answers_texts(tmp_path: Path) -> None:
    """Its vocabulary is its language model's, which also takes the positions; its tower is not adapted."""
    task = get_task("text-generation")
    model = load_model(task, make_base(task, "moss_transcribe_diarize", tmp_path / "base")).eval()
    recorded = inputs_of(model)
    assert recorded is not None
    assert recorded.input_ids
    assert recorded.features is None
    paths = [f"model.{part}.layers.0.self_attn.q_proj" for part in ("audio_tower", "language_model")]
    assert unused_layers(model, paths) == paths[:1]
    assert CausalDecoder(model).counts


def test_a_graph_leaves_them_out_by_name(bundle_of: Callable[..., Path]) -> None:
    """A graph of another task does not replay them; the reason is said."""
    bundle = read_bundle(bundle_of("bert", "bank"))
    for kind in ("vit", "t5"):
        assert (
            not_replayable(bundle, packed(kind))
            == "it has inputs that a graph for text-classification does not take"
        )


def test_a_recipe_is_all_that_is_stored(tmp_path: Path) -> None:
    """Seed and shape in the manifest, never pixels."""
    packed("vit", tmp_path / "p")
    stored = json.loads((tmp_path / "p" / m.FILE_NAME).read_text())["canary"]
    assert stored["pixels"] == {"seed": canary.SEED, "shape": [2, 3, 8, 12]}
    assert stored["input_ids"] == []
