"""Vision-language models: pictures of any size through graphs, sessions and answers, beside transformers."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
import transformers as hf
from architecture_proofs import make_pack
from architectures import KINDS
from datasets import Dataset
from every_family.processors import make_processor
from every_family.tiny import make_base as make_tiny
from PIL import Image
from serving.servers import ANN, begin
from transformers import vision_utils
from vision_models import FAMILIES, IMAGE, PICTURES, architecture, make_family, url

from adapterpack import Engine, LoRA, Session, adapt, chat, evaluate, export, load, run, save
from adapterpack.errors import ConfigError, StorageError, Unsupported
from adapterpack.exporting.tracing.vision_parts import Vision
from adapterpack.runtime.media.image_layouts import GRIDS, PIXELS, SIZES, layout_of
from adapterpack.runtime.media.pictures import PictureReader, fill_marks, join_pictures
from adapterpack.tasks.data.problems import IGNORED
from adapterpack.tasks.image_text_to_text import encode
from adapterpack.tasks.task import get_task
from adapterpack.torch_adapters.adapt import attach
from adapterpack.torch_adapters.canaries.inputs import token_types
from adapterpack.torch_adapters.layers.active import adapted_layers
from adapterpack.torch_adapters.models.load import load_model
from adapterpack.training.loop.media import Media

SHORT = {"qwen3_vl"}
"""The family of which every run of the tests exports one: patches, positions in three axes, deeper features."""


def greedy(base: Path, pack: Any, ids: list[int], images: dict[str, Any], count: int) -> list[int]:
    """The tokens that transformers itself generates, with its own positions and its own cache."""
    model = load_model(get_task("image-text-to-text"), base).eval()
    if pack is not None:
        attach(model, pack, check_base=False)
    tokens = torch.tensor([ids])
    more = {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in images.items()}
    if GRIDS in images:
        more["mm_token_type_ids"] = (tokens == IMAGE).int()
    elif model.config.model_type in {"gemma3", "paligemma"}:  # as their processors say
        seen = tokens == IMAGE if model.config.model_type == "gemma3" else tokens < 0
        more["token_type_ids"] = seen.int()
    with torch.no_grad():
        out = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            **more,
        )
    return out[0, len(ids) :].tolist()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any, Path]]:
    """A family -> its base, a pack, and a bank with it; made when first asked for."""

    @cache
    def make(name: str) -> tuple[Path, Any, Path]:
        folder = tmp_path_factory.mktemp(name)
        base = make_family(name, folder / "base")
        pack = make_pack(architecture(name), base, KINDS[0])
        export(base, [pack], folder / "bundle", mode="bank")
        return base, pack, folder / "bundle"

    return make


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name not in SHORT)) for name in FAMILIES]
)
def test_rows_with_pictures_and_adapters_answer_as_transformers_does(
    name: str, made: Callable[[str], tuple[Path, Any, Path]]
) -> None:
    """A bank: one row with two pictures of other sizes, one without, one with another adapter; the export
    proves the logits, and here the tokens are those of ``generate``, on the engine.
    """
    base, pack, bundle = made(name)
    session = Session(bundle, "cpu")
    assert session.bundle.parity["long_rows"].get("unjudged", []) == []
    assert session.bundle.decoder
    mark = "<start_of_image>" if name == "gemma3" else "<image>"
    rows = [
        {"prompt": f"w20 {mark} w21 {mark} w22", "image": PICTURES[:2]},
        {"prompt": "w30 w31 w32 w33"},
        {"prompt": f"{mark} w40", "image": PICTURES[2]},
    ]
    names = [None, pack.name, pack.name]
    answers = session.task.answer(session, rows, names, {"max_new_tokens": 5, "min_new_tokens": 5})
    for row, adapter, answer in zip(rows, names, answers, strict=True):
        given = row.get("image", [])
        ids, seen = session.see(row["prompt"], given if isinstance(given, list) else [given])
        images = session.images(seen)
        if images and session.config["model_type"] in {"idefics3", "smolvlm"}:
            images[PIXELS] = images[PIXELS].reshape(1, -1, *images[PIXELS].shape[-3:])
        if name == "llava_onevision" and len(seen) > 1:  # several are read without tiles
            images |= {SIZES: np.full((len(seen), 2), 12), "batch_num_images": np.array([len(seen)])}
        wanted = greedy(base, pack if adapter else None, ids, images, 5)
        assert answer["completion"] == session.tokenizer.decode(wanted), row
    with pytest.raises(ConfigError, match="one mark for each"):
        list(run(bundle, [{"prompt": f"{mark} {mark}", "image": PICTURES[0]}]))
    with pytest.raises(ConfigError, match="no image"):
        list(run(bundle, [{"prompt": "w9 <image>"}]))


def test_a_conversation_has_pictures(made: Callable[[str], tuple[Path, Any, Path]]) -> None:
    """Each turn is answered as the row of all its messages; later turns still see the picture."""
    _, pack, bundle = made(*SHORT)
    options: dict[str, Any] = {"max_new_tokens": 4, "temperature": 0}
    talk, texts = chat(bundle, pack.name, **options), ("w20 w21", "w30 w31 w32")
    for text, pictures in zip(texts, (PICTURES[:1], []), strict=True):
        said = talk.say(text, pictures)
        row = {"messages": talk.messages[:-1], "adapter": pack.name}
        (wanted,) = run(bundle, [row], **options)
        assert (said["completion"], said["prompt_tokens"]) == (wanted["completion"], wanted["prompt_tokens"])
    blind = chat(bundle, pack.name, **options)
    assert blind.say(texts[0])["prompt_tokens"] < talk.say(texts[0])["prompt_tokens"]
    with pytest.raises(StorageError):
        talk.say("w1", ["nowhere.png"])
    assert len(talk.messages) == 6


def test_answers_about_pictures_are_measured(
    made: Callable[[str], tuple[Path, Any, Path]], tmp_path: Path
) -> None:
    """The model is asked with the tokens that training would show it, and what it says itself is an exact match."""
    base, pack, bundle = made(*SHORT)
    for number, picture in enumerate(PICTURES):
        (tmp_path / f"{number}.png").write_bytes(picture)
    texts = [(0, "w20 <image> w21"), (1, "w30 w31 w32"), (2, "<image> w40")]
    rows = [{"image": str(tmp_path / f"{at}.png"), "prompt": text} for at, text in texts]
    options: dict[str, Any] = {"max_new_tokens": 4, "temperature": 0}
    said = run(bundle, [{**row, "adapter": pack.name} for row in rows], **options)
    rows = [{**row, "completion": one["completion"]} for row, one in zip(rows, said, strict=True)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = evaluate(bundle, data=str(data), adapters=[pack.name], **options)
    assert [*found.measures] == ["base", pack.name]
    assert found.measures[pack.name] == dict.fromkeys(("exact_match", "rouge1", "rouge2", "rougeL"), 1)
    session = Session(bundle, "cpu")
    media = Media(base, session.task)
    media.tokenizer = hf.PreTrainedTokenizerFast.from_pretrained(base)  # as the bundle reads the file
    parts = encode(Dataset.from_list(rows), media, 512, "here")
    for row, part in zip(found.rows, parts, strict=True):
        (asked,) = row.asked
        ids, _ = session.see(asked["messages"], asked["image"])
        assert ids == part["input_ids"][: part["labels"].count(IGNORED)]


@pytest.mark.long
def test_adapters_of_a_tower_answer_in_the_engine_from_its_bank_alone(tmp_path: Path) -> None:
    """Rows with the bank's adapters answer as transformers does; another adapter of the tower cannot be loaded
    into the engine, whose graph reads what the tower made.
    """
    base, seeing = make_family("llava", tmp_path / "base"), architecture("llava", "all-linear")
    pack, bundle = make_pack(seeing, base, KINDS[0]), tmp_path / "bundle"
    assert any("vision_tower" in group.path for group in pack.manifest.adapter_groups)
    export(base, [pack], bundle, mode="bank")
    made = (base, pack, bundle)
    test_rows_with_pictures_and_adapters_answer_as_transformers_does("llava", lambda name: made)
    with pytest.raises(Unsupported, match="not in its bank"):
        Engine(bundle, "cpu").adapters.load(make_pack(seeing, base, KINDS[1]))


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
def test_the_client_of_openai_asks_about_pictures(
    name: str, made: Callable[[str], tuple[Path, Any, Path]], tmp_path: Path
) -> None:
    """Two pictures of other sizes in parts of a message, as data URLs, give what ``run`` answers; so in a stream
    and in the Responses API, and from a model without a chat template. An address is refused, and no picture is read
    from it.
    """
    _, pack, bundle = made(name)
    words = [{"type": "text", "text": "w20"}, {"type": "text", "text": "w21"}]
    images = [{"type": "image_url", "image_url": {"url": url(data)}} for data in PICTURES[:2]]
    messages: Any = [{"role": "user", "content": [words[0], images[0], images[1], words[1]]}]
    row = {"prompt": messages}
    (mine,) = run(bundle, [row], adapters=[pack.name], max_new_tokens=6)
    server = begin(bundle, tmp_path, sampling="greedy")
    try:
        client = openai.OpenAI(base_url=f"{server.address}/v1", api_key=ANN, max_retries=0, timeout=300)
        ask = partial(client.chat.completions.create, model=pack.name, max_tokens=6)
        answer = ask(messages=messages)
        assert answer.choices[0].message.content == mine["completion"]
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == mine["prompt_tokens"]
        streamed = [chunk.choices[0].delta.content or "" for chunk in ask(messages=messages, stream=True)]
        assert "".join(streamed) == mine["completion"]
        parts: Any = [
            {"type": "input_text", "text": "w20"},
            *({"type": "input_image", "image_url": url(data)} for data in PICTURES[:2]),
            {"type": "input_text", "text": "w21"},
        ]
        response = client.responses.create(
            model=pack.name, input=[{"role": "user", "content": parts}], max_output_tokens=6
        )
        assert response.output_text == mine["completion"]
        base = ask(messages=messages, model="base").choices[0].message.content
        assert base == next(iter(run(bundle, [row], max_new_tokens=6)))["completion"]
        away: Any = [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/a.png"}}]
        broken: Any = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
        for content, words_said in ((away, "no address is fetched"), (broken, "PNG and JPEG")):
            with pytest.raises(openai.BadRequestError, match=words_said):
                ask(messages=[{"role": "user", "content": content}])
    finally:
        server.process.kill()
        server.process.wait(10)


@pytest.mark.fast
@pytest.mark.parametrize("grid", itertools.product([2, 4, 6, 10], [2, 6, 8]))
def test_what_a_grid_gives_is_what_transformers_computes(grid: tuple[int, int]) -> None:
    """Positions, windows and resampled tables of patches, and the positions of tokens around images."""
    thw = torch.tensor([[1, *grid], [1, 4, 4]])
    vision = {"spatial_merge_size": 2, "window_size": 16, "patch_size": 4, "num_position_embeddings": 25}
    names = [PIXELS, "patch_positions", "patch_windows", "window_order", "table_places", "table_weights"]
    layout = layout_of({"vision_config": vision}, names, False)
    given = {PIXELS: np.zeros((int(thw.prod(1).sum()), 3), np.float32), GRIDS: thw.numpy()}
    feeds, images = next(iter(layout.passes(given)))
    assert images == [0]
    one = thw[:1]
    assert np.array_equal(feeds["patch_positions"], vision_utils.get_vision_position_ids(one, 2))
    order, ends = vision_utils.get_vision_window_index(one, 2, 16, 4)
    assert np.array_equal(feeds["window_order"], order)
    changes = np.flatnonzero(np.diff(feeds["patch_windows"])) + 1
    assert [0, *changes, len(feeds["patch_windows"])] == ends.tolist()
    taps, weights = vision_utils.get_vision_interpolation_indices_and_weights(one, 5, "bilinear", True, 2)
    dense = [np.zeros((len(taps), 25)) for _ in range(2)]
    rows = np.arange(len(taps))[:, None]
    np.add.at(dense[0], (rows, taps.numpy()), weights.numpy())
    np.add.at(dense[1], (rows, feeds["table_places"]), feeds["table_weights"])
    assert np.abs(dense[0] - dense[1]).max() < 1e-6
    length = layout.lengths(given)
    row = [3, *[IMAGE] * length[0], 4, 5, *[IMAGE] * length[1], 6]
    ids = np.array([row, [0] * (len(row) - 2) + [4, 5]])
    mask = np.array([[1] * len(row), [0] * (len(row) - 2) + [1, 1]])
    offsets = layout.offsets(ids, mask, IMAGE, given)
    assert offsets is not None
    model = hf.Qwen2VLModel.__new__(hf.Qwen2VLModel)
    model.__dict__["config"] = FAMILIES["qwen2_vl"].config()
    types = torch.from_numpy((ids == IMAGE).astype(int))
    places, deltas = hf.Qwen2VLModel.get_rope_index(
        model, torch.from_numpy(ids), types, thw, attention_mask=torch.from_numpy(mask)
    )
    counted = np.where(mask > 0, mask.cumsum(1) - 1, 0)
    moved = (counted[..., None] + offsets[:, :-1]).transpose(2, 0, 1)
    assert np.array_equal(moved[:, mask > 0], places.numpy()[:, mask > 0])
    assert np.array_equal(offsets[:, -1], np.repeat(deltas.numpy(), 3, axis=1))


@pytest.mark.fast
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_tiles_are_packed_as_transformers_packs_them(name: str) -> None:
    """Images of any form: the padding is cut off, many tiles are shrunk, and lines end with the new line."""
    config = FAMILIES[name].config()
    layout = layout_of(config.to_dict(), [PIXELS], False, 10)
    rng = np.random.default_rng(0)
    kind = type(hf.AutoModelForImageTextToText.from_config(config).model)
    model = kind.__new__(kind)
    model.__dict__["config"] = config
    for size in [(12, 30), (40, 9), (24, 24), (100, 70), (11, 11)]:
        given = {PIXELS: np.zeros((1, 5, 3, 12, 12), np.float32), SIZES: np.array([size])}
        tiles = rng.normal(size=(layout.counts(given)[0], 10, 4)).astype(np.float32)
        line = tiles[:, -1:] = tiles[:1, -1:]
        (mine,) = layout.features([tiles], given)
        whole = torch.from_numpy(tiles[:, :-1].copy())
        options = {"vision_feature_select_strategy": "full"} if name == "llava_next" else {}
        options |= {"vision_aspect_ratio": config.vision_aspect_ratio} if name != "llava_next" else {}
        (theirs,), _ = kind.pack_image_features(
            model, [whole], torch.tensor([size]), image_newline=torch.from_numpy(line[0, 0].copy()), **options
        )
        assert layout.lengths(given) == [len(theirs)]
        assert np.abs(mine - theirs.numpy()).max() < 1e-5


@pytest.mark.fast
def test_types_of_tokens_say_what_sees_later_tokens() -> None:
    """Of Gemma 3 its images, of PaliGemma the prompt, of a LLaVA nothing; with these types the models' own
    masks show the tokens of one image, or of the prompt, to each other.
    """
    ids, answers = torch.tensor([[5, IMAGE, IMAGE, 6, 9]]), torch.tensor([[0, 0, 0, 0, 1]])
    for name, wanted in (
        ("gemma3", [0, 1, 1, 0, 0]),
        ("paligemma", [0, 0, 0, 0, 1]),
        ("paligemma2", [0, 0, 0, 0, 1]),
        ("llava", None),
    ):
        model = hf.AutoModelForImageTextToText.from_config(FAMILIES[name].config())
        types = token_types(model, ids, answers)
        assert [one.tolist() for one in types.values()] == ([[wanted]] if wanted else []), name


@pytest.mark.fast
def test_a_model_of_texts_alone_gets_no_adapters_in_its_tower(tmp_path: Path) -> None:
    """Loaded for texts, a model that could see trains and packs its language part, and a canary of texts; a
    graph for texts has nothing else.
    """
    base = make_family("gemma3", tmp_path / "base")
    for task, seeing in (("text-generation", False), ("image-text-to-text", True)):
        model = adapt(load_model(get_task(task), base), LoRA(r=2), "words")
        paths = {layer._site.path for layer in adapted_layers(model)}
        assert paths
        assert any("vision_tower" in path for path in paths) == seeing
        pack = save(model, tmp_path / task, base=base, name="words")
        canary = load(tmp_path / task).manifest.canary
        assert canary is not None and (canary.pixels is not None) == seeing, pack


@pytest.mark.fast
@pytest.mark.parametrize(
    "kind",
    ["aya_vision", "deepseek_vl", "gemma3", "glm4v", "idefics3", "internvl", "llava_next", "llava_onevision"],
)
def test_texts_and_pictures_are_what_the_processor_of_the_type_makes(kind: str, tmp_path: Path) -> None:
    """One picture, and two of other sizes, to the token and the pixel."""
    task = get_task("image-text-to-text")
    make_tiny(task, kind, tmp_path)
    model = load_model(task, tmp_path)
    processor, vision = make_processor(kind, model, tmp_path), Vision(model)
    example = {key: torch.from_numpy(one) for key, one in vision.example(1, np.random.default_rng(0)).items()}
    shape = [*vision.example_inputs(example)[PIXELS].shape[1:]]
    token = processor.tokenizer.convert_ids_to_tokens(model.config.image_token_id)
    reader = PictureReader(tmp_path, vision.layout, shape, token)
    assert reader.mark == processor.image_token
    for pictures in (PICTURES[:1], PICTURES[:2]):
        seen = [reader.read(picture, len(pictures) == 1) for picture in pictures]
        text = f"w60 {' w62 '.join([reader.mark] * len(pictures))} w61"
        images = [[Image.open(io.BytesIO(picture)) for picture in pictures]]
        wanted = processor(text=[text], images=images, return_tensors="np", add_special_tokens=False)
        found = processor.tokenizer(fill_marks(text, reader.mark, seen), add_special_tokens=False)
        assert found["input_ids"] == wanted["input_ids"][0].tolist()
        assert np.array_equal(join_pictures(seen)[PIXELS].ravel(), wanted[PIXELS].ravel())


@pytest.mark.fast
@pytest.mark.parametrize("marks", [2, 0])
def test_a_row_of_paligemma_is_trained_as_its_processor_writes_prompts(marks: int, tmp_path: Path) -> None:
    """Each picture in its place, or all at the beginning, and the start token after the last; the tokenizer's
    own start token is not there as well.
    """
    task = get_task("image-text-to-text")
    make_tiny(task, "paligemma", tmp_path)
    processor = make_processor("paligemma", load_model(task, tmp_path), tmp_path)
    text = "w60 <image> w62 <image> w61" if marks else "w60 w61"
    rows = Dataset.from_dict({"prompt": [text], "completion": ["w70"], "images": [PICTURES[:2]]})
    (found,) = encode(rows, Media(tmp_path, task), 64, "data.jsonl")
    images = [[Image.open(io.BytesIO(picture)) for picture in PICTURES[:2]]]
    asked = processor(text=[text], images=images, add_special_tokens=False)["input_ids"][0]
    assert found["input_ids"] == [*asked, 70, 2]
    assert found["labels"] == [*[IGNORED] * len(asked), 70, 2]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("lfm2_vl", "spatial_shapes"),
        ("ovis2", "visual_indicator_token_ids"),
        ("mllama", "in the place of a token"),
    ],
)
def test_a_model_that_sees_in_another_way_is_refused_by_what_it_asks(
    kind: str, said: str, tmp_path: Path
) -> None:
    """Before anything is traced."""
    task = get_task("image-text-to-text")
    make_tiny(task, kind, tmp_path)
    with pytest.raises(Unsupported, match=said):
        Vision(load_model(task, tmp_path))


@pytest.mark.fast
def test_what_an_unknown_processor_writes_is_not_guessed(tmp_path: Path) -> None:
    """Its image processor may be known, and the text around a picture another."""
    hf.GotOcr2ImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text('{"processor_class": "GotOcr2Processor"}')
    reader = PictureReader(tmp_path, layout_of({}, [PIXELS], False, 4), [3, 16, 16], "<image>")
    with pytest.raises(Unsupported, match="writes around a picture is not known"):
        reader.read(PICTURES[0])


@pytest.mark.fast
def test_a_processor_is_not_told_to_make_giants(tmp_path: Path) -> None:
    """Settings of a stranger's bundle are bounded before any picture is made."""
    settings = {**FAMILIES["qwen2_vl"].settings, "min_pixels": 1 << 40}
    hf.Qwen2VLImageProcessorPil(**settings).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="out of range"):
        PictureReader(tmp_path, layout_of({}, [PIXELS], False), [3, None, None], "<image>")
    assert join_pictures([]) == {}
