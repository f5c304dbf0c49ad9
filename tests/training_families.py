"""Training in 26 families, by a loop of one's own and by a configuration: what the table in
``docs/train-families.md`` says of each.

``python tests/training_families.py > docs/train-families.md`` trains them all and writes the table anew.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from architectures import ARCHITECTURES, WORDS
from torch import nn

from adapterpack import LoRA, adapt, attach, load, save, validate
from adapterpack.tasks.task import get_task
from adapterpack.torch_adapters.layers.layer import Adapted
from adapterpack.training.config.config import read_config
from adapterpack.training.pipeline import train_one

Batch = dict[str, Any]
LABELS = ("a", "b", "c")
STEPS = 4
ROWS, LENGTH = 3, 9


class Family(NamedTuple):
    """``auto`` is the class that loads the task's model, ``base`` the one whose checkpoint it is loaded from.
    ``batch`` is learned by the loop, ``rows`` by a configuration; None where the task has no such rows.
    ``settings`` are a configuration's. ``tokenizer`` writes the files of one where transformers reads all of
    a family's as one kind.
    """

    name: str
    config: Callable[[Any], Any]
    auto: str
    batch: Callable[[], Batch]
    task: str | None = None
    rows: Callable[[Path], list[dict[str, Any]]] | None = None
    base: str | None = None
    settings: Mapping[str, Any] = {}
    tokenizer: Callable[[Path], None] | None = None
    targets: str | tuple[str, ...] = "all-linear"

    def make_base(self, folder: Path, tokenizer: Path) -> Path:
        """A random checkpoint in which nothing is zero or one, with the files of a tokenizer."""
        torch.manual_seed(5)
        model = getattr(transformers, self.base or self.auto).from_config(self.config(transformers))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer(folder)
            return folder
        for path in tokenizer.glob("*token*"):
            shutil.copyfile(path, folder / path.name)
        return folder

    def load(self, base: Path) -> Any:
        """The task's model; a head that the base does not have is random."""
        torch.manual_seed(7)
        options = {} if self.base is None else {"num_labels": len(LABELS)}
        return getattr(transformers, self.auto).from_pretrained(base, **options).eval()


class Found(NamedTuple):
    """What became of a family: its model's class, how many layers were adapted, whether the loss fell, and
    how far the outputs of the pack, attached to a model that was loaded anew, are from those of the trained
    model; of a training by a configuration the same, or None.
    """

    model: str
    sites: int
    fell: bool
    difference: float
    configured: float | None


def ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(10, WORDS, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed))


def image() -> torch.Tensor:
    return torch.linspace(-9, 9, ROWS * 3 * 12 * 12).reshape(ROWS, 3, 12, 12).sin()


def spoken() -> Batch:
    return {
        "input_features": torch.linspace(-9, 9, ROWS * 8 * 40).reshape(ROWS, 8, 40).sin(),
        "labels": ids()[:, :5].contiguous(),
    }


def decoded() -> Batch:
    return {"input_ids": ids(), "labels": ids()}


def two_sided() -> Batch:
    return {"input_ids": ids(), "labels": ids(1)[:, :5].contiguous()}


def labelled() -> Batch:
    return {"input_ids": ids(), "labels": torch.arange(ROWS)}


def seeing() -> Batch:
    """A row of LLaVA: nine places of an image, then words."""
    both = torch.cat([torch.full((ROWS, 9), 7), ids()], 1)
    return {"input_ids": both, "labels": both, "pixel_values": image()}


def seeing_patches() -> Batch:
    """A row of Qwen2-VL: four places of an image of sixteen patches, then words."""
    both = torch.cat([torch.full((ROWS, 1), 8), torch.full((ROWS, 4), 7), ids()], 1)
    patches = torch.linspace(-9, 9, ROWS * 16 * 3 * 2 * 4 * 4).reshape(ROWS * 16, -1).sin()
    return {
        "input_ids": both,
        "labels": both,
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, 4, 4]] * ROWS),
        "mm_token_type_ids": (both == 7).int(),
    }


def words(dice: random.Random, most: int = 7) -> list[str]:
    return [f"w{dice.randrange(10, 80)}" for _ in range(dice.randrange(2, most))]


def texts(folder: Path) -> list[dict[str, Any]]:
    dice = random.Random(1)
    return [{"prompt": " ".join(words(dice)), "completion": " ".join(words(dice, 4))} for _ in range(12)]


def classes(folder: Path) -> list[dict[str, Any]]:
    dice = random.Random(2)
    return [{"text": " ".join(words(dice)), "label": LABELS[number % 3]} for number in range(12)]


def tags(folder: Path) -> list[dict[str, Any]]:
    dice = random.Random(3)
    return [
        {"tokens": row, "labels": [LABELS[place % 3] for place in range(len(row))]}
        for row in (words(dice) for _ in range(12))
    ]


def array(folder: Path, name: str, values: torch.Tensor) -> str:
    np.save(folder / f"{name}.npy", values.numpy())
    return str(folder / f"{name}.npy")


def pictures(folder: Path) -> list[dict[str, Any]]:
    """Rows with an image each, and what tasks of images learn of it."""
    return [
        {"image": array(folder, f"image-{number}", image()[number % ROWS] + number / 9), **row}
        for number, row in enumerate(texts(folder))
    ]


def labelled_pictures(folder: Path) -> list[dict[str, Any]]:
    return [
        {"image": row["image"], "label": LABELS[number % 3]} for number, row in enumerate(pictures(folder))
    ]


def captions(folder: Path) -> list[dict[str, Any]]:
    return [{"image": row["image"], "text": row["prompt"]} for row in pictures(folder)]


def speech(folder: Path) -> list[dict[str, Any]]:
    return [
        {
            "audio": array(folder, f"audio-{number}", spoken()["input_features"][number % ROWS]),
            "text": row["completion"],
        }
        for number, row in enumerate(texts(folder))
    ]


CONFIGS = {one.name: one.config for one in ARCHITECTURES}
LLM = "AutoModelForCausalLM", decoded, "text-generation", texts
MIXTURE: dict[str, Any] = {"settings": {"experts": True}, "targets": ("all-linear", "all-experts")}
CLASSIFIER = "AutoModelForSequenceClassification", labelled, "text-classification", classes, "AutoModel"


def _characters(folder: Path) -> None:
    """Each character of the rows' words is a token: Qwen2's pairs of bytes, of which none are joined."""
    tokens = ["<|endoftext|>", *"0123456789w", "\u0120"]
    transformers.Qwen2Tokenizer({token: number for number, token in enumerate(tokens)}, []).save_pretrained(
        folder
    )


def _qwen3_moe(hf: Any) -> Any:
    return hf.Qwen3MoeConfig(
        **CONFIGS["qwen3"](hf).to_dict()
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "architectures": None,
            "model_type": "qwen3_moe",
        }
    )


def _qwen2_vl(hf: Any) -> Any:
    text = {
        "vocab_size": WORDS,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    return hf.Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=7,
        vision_start_token_id=8,
        video_token_id=9,
        vision_end_token_id=6,
    )


def _hubert(hf: Any) -> Any:
    return hf.HubertConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        conv_dim=(12, 12),
        conv_stride=(4, 3),
        conv_kernel=(5, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
        classifier_proj_size=16,
        apply_spec_augment=False,
        layerdrop=0.0,
    )


def _sound() -> Batch:
    return {
        "input_values": torch.linspace(-99, 99, ROWS * 400).reshape(ROWS, 400).sin(),
        "labels": torch.arange(ROWS),
    }


FAMILIES: tuple[Family, ...] = (
    *(
        Family(name, CONFIGS[name], *LLM, tokenizer=_characters if name == "qwen2" else None)
        for name in (
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "gemma2",
            "gemma3",
            "phi3",
            "gpt2",
            "opt",
            "bloom",
            "falcon",
        )
    ),
    Family("mixtral", CONFIGS["mixtral"], *LLM, **MIXTURE),
    Family("qwen3-moe", _qwen3_moe, *LLM, **MIXTURE),
    *(
        Family(name, CONFIGS[name], *CLASSIFIER)
        for name in ("bert", "distilbert", "deberta-v2", "modernbert")
    ),
    Family(
        "roberta",
        CONFIGS["roberta"],
        "AutoModelForTokenClassification",
        lambda: {"input_ids": ids(), "labels": ids() % len(LABELS)},
        "token-classification",
        tags,
        "AutoModel",
    ),
    Family("t5", CONFIGS["t5"], "AutoModelForSeq2SeqLM", two_sided, "text2text-generation", texts),
    Family("bart", CONFIGS["bart"], "AutoModelForSeq2SeqLM", two_sided, "text2text-generation", texts),
    Family(
        "whisper",
        CONFIGS["whisper"],
        "AutoModelForSpeechSeq2Seq",
        spoken,
        "automatic-speech-recognition",
        speech,
    ),
    Family(
        "vit",
        CONFIGS["vit"],
        "AutoModelForImageClassification",
        lambda: {"pixel_values": image(), "labels": torch.arange(ROWS)},
        "image-classification",
        labelled_pictures,
        "AutoModel",
    ),
    Family(
        "clip",
        CONFIGS["clip"],
        "AutoModel",
        lambda: {"input_ids": ids(), "pixel_values": image(), "return_loss": True},
        "zero-shot-image-classification",
        captions,
    ),
    Family("llava", CONFIGS["llava"], "AutoModelForImageTextToText", seeing, "image-text-to-text", pictures),
    Family("qwen2-vl", _qwen2_vl, "AutoModelForImageTextToText", seeing_patches),
    Family("hubert", _hubert, "AutoModelForAudioClassification", _sound, base="AutoModel"),
)


def outputs(model: nn.Module, batch: Batch) -> torch.Tensor:
    """What the model says of a batch, as one vector."""
    with torch.no_grad():
        said = model.eval()(**batch)
    names = ("logits", "logits_per_image")
    return torch.cat([said[name].float().flatten() for name in names if said.get(name) is not None])


def difference(family: Family, model: nn.Module, base: Path, pack: Path) -> float:
    """How far apart the outputs are of the trained model and of the pack on a model that is loaded anew.

    Raises:
        AssertionError: the pack is not valid, or changes nothing.
    """
    assert (report := validate(pack, base)).valid, report
    fresh, batch = family.load(base), family.batch()
    without = outputs(fresh, batch)
    again = outputs(attach(fresh, load(pack)), batch)
    assert without.shape != again.shape or not torch.equal(without, again)
    return float((outputs(model, batch) - again).abs().max())


def by_loop(family: Family, base: Path, out: Path) -> tuple[str, int, bool, float]:
    """Trains by a loop of one's own: the model's class, how many layers were adapted, whether the loss fell,
    and the difference.
    """
    model = adapt(family.load(base), LoRA(r=4, targets=family.targets), "loop").train()
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-2)
    losses = []
    for _ in range(STEPS):
        loss = model(**family.batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    save(model.eval(), out, base=base)
    sites = sum(isinstance(module, Adapted) for module in model.modules())
    return type(model).__name__, sites, losses[-1] < losses[0], difference(family, model, base, out)


def by_configuration(family: Family, base: Path, folder: Path) -> float | None:
    """Trains by a configuration; the difference, or None where the family's task is not trained so."""
    if family.task is None or family.rows is None:
        return None
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in family.rows(folder)))
    (config,), _ = read_config(
        {
            "model_name_or_path": str(base),
            "task": get_task(family.task).name,
            "train_file": str(data),
            "output_dir": str(folder / "set"),
            "learning_rate": 1e-2,
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "max_length": 40,
            "r": 4,
            "save_strategy": "no",
            **family.settings,
        }
    )
    _, model = train_one(config)
    return difference(family, model, base, folder / "set")


def proved(family: Family, folder: Path, tokenizer: Path) -> Found:
    """Trains one family both ways."""
    base = family.make_base(folder / "base", tokenizer)
    return Found(*by_loop(family, base, folder / "loop"), by_configuration(family, base, folder))


HEAD = "| family | class | adapted layers | loop | configuration |"


def line(family: Family, found: Found) -> str:
    """The family's line of the table."""
    configured = "-" if found.configured is None else f"{family.task}: {found.configured:g}"
    return f"| {family.name} | {found.model} | {found.sites} | {found.difference:g} | {configured} |"


def render(tokenizer: Path) -> str:
    """The page."""
    lines = []
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            found = proved(family, Path(folder), tokenizer)
        assert found.fell, family.name
        lines.append(line(family, found))
    intro = f"""A tiny random model of each of {len(FAMILIES)} families is trained in two ways: by a loop of one's own around
`adapterpack.adapt`, in which its loss falls, and by the configuration of `adapterpack train`, where its task can be trained so. Each pack
is saved, validated against its base, and attached to a model that is loaded anew. The numbers under `loop` and `configuration` are the
largest differences between the outputs of that model and those of the trained one.

The adapter is a LoRA of all linear layers, and of the experts in mixtures; heads that the base's checkpoint does not hold are trained
whole. Made by `python tests/training_families.py`; `tests/test_train_families.py` proves its lines."""
    return f"# Families that train\n\n{intro}\n\n" + "\n".join([HEAD, "|---" * 5 + "|", *lines]) + "\n"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    from word_tokenizer import write_tokenizer

    with tempfile.TemporaryDirectory() as made:
        write_tokenizer(Path(made))
        sys.stdout.write(render(Path(made)))
