"""Puts training files that other projects publish (``../shared/world``) through this package: each is read, and trains one
step on a tiny random model of its kind with two rows of the form that it names.

``python tests/world_files.py`` prints what becomes of each, in about ten minutes; ``--write`` renews their
lines in ``tests/golden/world_files.tsv``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from every_family.tiny import make_base
from PIL import Image
from vision_models import make_family
from word_tokenizer import write_tokenizer

import adapterpack
from adapterpack.errors import AdapterpackError, StorageError, UnknownMethod
from adapterpack.tasks.conversations.templates import chat_template
from adapterpack.tasks.task import get_task
from adapterpack.training.config.config import read_config
from adapterpack.training.config.fields import TrainConfig
from adapterpack.training.config.sources import Source, sources_of

WORLD = Path(__file__).parents[2] / "shared" / "world"
GOLDEN = Path(__file__).parent / "golden" / "world_files.tsv"
KINDS = (
    ("llama-?4", "llama4_text"),
    ("mixtral", "mixtral"),
    ("deepseek-v4", "deepseek_v4"),
    ("deepseek-v3", "deepseek_v3"),
    ("deepseek-v2", "deepseek_v2"),
    (
        "deepcoder|cogito-v1-preview-qwen|qwen2.5|qwen2-7b|mimo",
        "qwen3",
    ),  # Qwen2's type forces its own tokenizer
    ("qwen1.5-moe", "qwen2_moe"),
    ("qwen3-next", "qwen3_next"),
    ("qwen3.5.*a[0-9]+b", "qwen3_next"),  # the same layers; the newer type forces its own tokenizer
    ("qwen3.5", "qwen3_5_text"),
    ("qwen3.*a[0-9]+b", "qwen3_moe"),
    ("qwen3|plano", "qwen3"),
    ("gemma-2", "gemma2"),
    ("gemma-3n", None),
    ("gemma-3", "gemma3"),
    ("gemma-4-12b", "gemma4_unified"),
    ("gemma-4-26b", "gemma4 with experts"),
    ("gemma-4", "gemma4"),
    ("gemma", "gemma"),
    ("gpt-oss", "gpt_oss"),
    ("gpt-j", "gptj"),
    ("pythia", "gpt_neox"),
    ("cerebras-gpt", "gpt2"),
    ("falcon-h1", "falcon_h1"),
    ("falcon-7b", "falcon"),
    ("jamba", "jamba"),
    ("lfm2-8b", "lfm2_moe"),
    ("ministral-3", "ministral3"),
    ("mistral-medium-3|mistral-small-4|voxtral", None),
    ("mistral|magistral|devstral", "mistral"),
    ("minimax-m2", "minimax_m2"),
    ("nemotron-3", "nemotron_h"),
    ("nemotron-mini", "nemotron"),
    ("olmo-3", "olmo3"),
    ("phi-3", "phi3"),
    ("phi-1", "phi"),
    ("seed-oss", "seed_oss"),
    ("stablelm", "stablelm"),
    ("starcoder2", "starcoder2"),
    ("apertus", "apertus"),
    ("hunyuan", "hunyuan_v1_dense"),
    ("afm-4.5", "arcee"),
    ("trinity", "afmoe"),
    ("command-?r", "cohere2"),
    ("dbrx", "dbrx"),
    ("glm-4-32b", "glm4"),
    ("glm-4.5", "glm4_moe"),
    ("glm-4.7-flash", "glm4_moe_lite"),
    ("glm-5", "glm_moe_dsa"),
    ("llama|yi-34b|aqlm", "llama"),
)
"""A pattern of bases' names -> the type of their configuration, the first that fits."""
SEEING = {
    "smolvlm": "smolvlm",
    "internvl": "internvl",
    "qwen2-vl": "qwen2_vl",
    "qwen2.5-vl": "qwen2_5_vl",
    "qwen3-vl": "qwen3_vl",
    "gemma-3-4b": "gemma3",
    "llava-1.5": "llava",
    "pixtral": "pixtral",
    "mistral-small-3|magistral|ministral-3": "mistral3",
}
"""The same for bases that see -> the family in ``vision_models``."""
EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
FIELDS = {"gemma4 with experts": {"text_config": EXPERTS}}
"""Fields that make a kind what it is."""
SPECIAL = ("<|im_start|>", "<|im_end|>")


def files() -> Iterator[Path]:
    """Every training file there, in order."""
    yield from sorted(path for path in WORLD.glob("*/examples/**/*") if path.suffix in {".yaml", ".yml"})


def kind_of(base: str, kinds: Iterable[tuple[str, str | None]] = KINDS) -> str | None:
    """The type of a base by its name; None for one that is code of its own, or needs packages that are not here."""
    return next((kind for pattern, kind in kinds if re.search(pattern, base.lower())), None)


def seeing_base(kind: str, folder: Path) -> tuple[Path, str]:
    """A tiny base that sees, and the path of a picture."""
    base, picture = folder / kind, folder / "picture.png"
    make_family(kind, base)
    file = base / "tokenizer_config.json"
    file.write_text(json.dumps({"unk_token": "<pad>", "bos_token": "<s>", **json.loads(file.read_text())}))
    Image.new("RGB", (24, 24), "teal").save(picture)
    return base, str(picture)


def rows_of(source: Source, config: TrainConfig) -> list[dict[str, Any]]:
    """Two rows of the form that a source names, with its names of columns, messages and roles."""
    names = {"role": "role", "content": "content", **source.messages}
    role = {ours: several[0] for ours, several in source.roles.items()}
    form = "alpaca-prompt" if isinstance(source.form, Mapping) else source.form or "messages"

    def turn(who: str, text: str) -> dict[str, str]:
        return {names["role"]: role.get(who, who), names["content"]: text}

    asked, said = [turn("user", "w1 w2")], turn("assistant", "w3 w4")
    rows: dict[str, dict[str, Any]] = {
        "messages": {"messages": [*asked, said]},
        "chat-pairs": {"messages": asked, "chosen": said, "rejected": turn("assistant", "w5")},
        "pairs": {"chosen": [*asked, said], "rejected": [*asked, turn("assistant", "w5")]},
        "sharegpt": {"conversations": [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w3"}]},
        "text": {"text": "w1 w2 w3"},
        "alpaca": {"instruction": "w1", "input": "", "output": "w3"},
        "alpaca-prompt": {"instruction": "w1", "input": "w2", "output": "w3"},
        "alpaca-pairs": {"instruction": "w1", "input": "", "chosen": "w3", "rejected": "w4"},
        "sharegpt-pairs": {
            "conversations": [{"from": "human", "value": "w1"}],
            "chosen": {"from": "gpt", "value": "w3"},
            "rejected": {"from": "gpt", "value": "w4"},
        },
        "labelled-answers": {"prompt": "w1", "completion": "w3", "label": True},
        "labelled-chats": {
            "messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w3"}],
            "label": True,
        },
    }
    if isinstance(source.form, Mapping) and config.trainer != "sft":
        form = "written verdicts" if config.trainer == "kto" else "written pairs"
        rows[form] = {"prompt": "w1", "completion": "w3", "chosen": "w3", "rejected": "w4", "label": True}
    row = {source.columns.get(name, name): value for name, value in rows[form].items()}
    judged = "label" in row and config.trainer == "kto"
    return [row, {**row, "label": False} if judged else row]


def train_one(path: Path, folder: Path) -> str:
    """What becomes of a file: ``trained``, or why it is not."""
    with contextlib.chdir(WORLD / path.relative_to(WORLD).parts[0]):
        (config,), _ = read_config(path)
        sources = sources_of(config.train_file, path)
    if config.task not in {"text-generation", "image-text-to-text"}:
        return f"read: {config.task}, for which no rows are made here"
    sees = config.task == "image-text-to-text"
    kind = kind_of(config.model_name_or_path, SEEING.items() if sees else KINDS)
    if kind is None:
        return "read: no tiny model of this kind can be made here"
    picture = None
    if sees:
        base, picture = seeing_base(kind, folder)
    else:
        base = folder / kind
        make_base(get_task(config.task), kind.split()[0], base, **FIELDS.get(kind, {}))
        named = tuple(
            token
            for key, token in config.special_tokens.items()
            if key != "pad_token" and not token.startswith("[")
        )
        write_tokenizer(base, (*SPECIAL, *dict.fromkeys(named)), chat_template("axolotl/chatml"))
    written = []
    for number, source in enumerate(sources):
        rows = folder / f"{number}.jsonl"
        lines = [json.dumps(row) for row in rows_of(source, config)]
        if picture is not None:  # words that every tokenizer of a base that sees has
            seen = {source.columns.get("images", "images"): [picture]}
            lines = [
                json.dumps({**json.loads(re.sub(r"w[0-9]( w[0-9])*", "<img>", line)), **seen})
                for line in lines
            ]
        rows.write_text("".join(f"{line}\n" for line in lines))
        kept = {
            "form": source.form,
            "columns": source.columns,
            "messages": source.messages,
            "roles": source.roles,
        }
        written.append({"path": str(rows), **{key: value for key, value in kept.items() if value}})
    small = {"max_length": 64, "max_steps": 1, "gradient_accumulation_steps": 2, "load_in_4bit": False}
    small |= {"model_name_or_path": str(base), "output_dir": str(folder / "pack"), "load_in_8bit": False}
    small |= {"train_file": written, "val_set_size": 0, "eval_strategy": "no", "eval_file": None}
    small |= {"early_stopping_patience": None, "adapter_name_or_path": None, "name": "pack"}
    with contextlib.chdir(WORLD / path.relative_to(WORLD).parts[0]):
        adapterpack.train(path, [f"{key}={json.dumps(value)}" for key, value in small.items()])
    return "trained"


def outcome(path: Path) -> str:
    """What becomes of a file, as a line."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return train_one(path, Path(folder))
        except (AdapterpackError, StorageError, UnknownMethod) as error:
            said = str(error).replace(str(path), "the file").replace(folder, "FOLDER")
            return f"stops: {' '.join(said.split())}"[:300]
        except Exception as error:  # what breaks is an outcome, too, and the one that matters most
            return f"breaks: {type(error).__name__}: {' '.join(str(error).split())}"[:300]


def recorded() -> list[str]:
    """The lines of the record, without its heading; none where there is no record yet."""
    return GOLDEN.read_text().splitlines()[1:] if GOLDEN.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    os.environ.setdefault("TQDM_DISABLE", "1")
    lines = []
    for path in files():
        if options.only in str(path):
            lines.append(f"{path.relative_to(WORLD)}\t{outcome(path)}")
            sys.stdout.write(lines[-1] + "\n")
            sys.stdout.flush()
    trained = sum(line.endswith("\ttrained") for line in lines)
    sys.stdout.write(f"{len(lines)} files, {trained} trained\n")
    if options.write:
        known = dict(line.split("\t") for line in recorded()) | dict(line.split("\t") for line in lines)
        GOLDEN.write_text("file\toutcome\n" + "".join(f"{name}\t{known[name]}\n" for name in sorted(known)))


if __name__ == "__main__":
    main()
