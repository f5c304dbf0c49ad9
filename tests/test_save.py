"""What save writes of the base, its tokenizer and the training: what the folder holds, the same bytes every
time, and nothing invented.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from noise import shake
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, MarianConfig, MarianMTModel

import adapterpack
from adapterpack import LoRA, Pack, adapt, attach, load, save, train, validate
from adapterpack.base.base_metadata import license_of, tokenizer_of
from adapterpack.base.checkpoint import Checkpoint
from adapterpack.errors import OutputExists, Unsupported
from adapterpack.manifest import manifest as m
from adapterpack.manifest.structs import Dims, PackTokenizer
from adapterpack.torch_adapters.checkpoint_names import drawn_modules

pytestmark = pytest.mark.fast


def packed(base: Path, **kwargs: Any) -> Pack:
    model = adapt(AutoModelForCausalLM.from_pretrained(base), LoRA(r=2), "p")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    return save(model, None, **kwargs)


@pytest.fixture
def base(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy to which things can be added."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "base"))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_the_base_is_described(tiny_llama: Path) -> None:
    """Class, sizes and all four levels of the fingerprint."""
    found, known = packed(tiny_llama).manifest.base, Checkpoint(tiny_llama)
    assert (found.name, found.model_type, found.architecture) == ("tiny-llama", "llama", "LlamaForCausalLM")
    assert found.dims == Dims(hidden=32, layers=2, heads=4, vocab=96)
    assert (found.structure, found.content, found.files, found.probe) == known.fingerprint(files=True)
    assert None not in (found.files, found.probe)


def test_a_size_that_layers_differ_in_is_left_out(tiny_llama: Path) -> None:
    """transformers refuses to read it from the config of the whole model."""
    model = shake(adapt(AutoModelForCausalLM.from_pretrained(tiny_llama), LoRA(r=2), "one"))
    model.config.per_layer_config = {0: {"num_attention_heads": 2}}
    with pytest.raises(RuntimeError):
        _ = model.config.num_attention_heads
    pack = save(model, None, base=tiny_llama, name="one")
    assert pack.manifest.base.dims == Dims(hidden=32, layers=2, vocab=96)


def test_the_architecture_is_the_base_s_own(tiny_bert: Path) -> None:
    """A classifier on an encoder: the base is the encoder, the task's model is the classifier."""
    model = adapt(
        AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2),
        LoRA(r=1, modules_to_save=("classifier",)),
    )
    manifest = save(model, None).manifest
    assert (manifest.base.architecture, manifest.task.architecture) == (
        "BertModel",
        "BertForSequenceClassification",
    )


@pytest.mark.parametrize("told", [["no name!"], ["é"], ["x" * 129], [7], [], "LlamaForCausalLM", None])
def test_an_architecture_that_is_no_name_is_left_out(
    told: Any, base: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    """What a stranger's config says there may be anything; the pack stays readable."""
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "architectures": told}))
    pack = save(
        adapt(AutoModelForCausalLM.from_pretrained(tiny_llama), LoRA(r=1), "p"), tmp_path / "p", base=base
    )
    assert pack.manifest.base.architecture is None


def test_the_tokenizer_is_known_by_its_digests(base: Path, tmp_path: Path) -> None:
    """sha256 of tokenizer.json, of added_tokens.json and of the chat template; a base without is told by
    None, and by validate if it changes.
    """
    (base / "added_tokens.json").write_text('{"<x>": 96}')
    (base / "chat_template.jinja").write_text("{{ messages[0].content }} é\n")
    pack = packed(base)
    assert pack.manifest.tokenizer == PackTokenizer(
        *(
            sha256((base / name).read_bytes())
            for name in ("tokenizer.json", "added_tokens.json", "chat_template.jinja")
        )
    )
    pack.write(tmp_path / "p")
    assert validate(tmp_path / "p", base).valid
    (base / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert [finding.rule for finding in validate(tmp_path / "p", base).findings] == ["AP702"]
    for name in ("added_tokens.json", "chat_template.jinja", "tokenizer.json"):
        (base / name).unlink()
    assert tokenizer_of(Checkpoint(base)) is None


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlanguage: en\nlicense: apache-2.0\n---\n# Card\n", "apache-2.0"),
        ("---\nlicense: 'mit' # as ever\n---\n", "mit"),
        ("---\nlanguage: en\n---\nlicense: mit\n", None),
        ("license: mit\n", None),
        ("---\nlicense:\n  - mit\n---\n", None),
        ("---\nlicense: \x1b[31mred\n---\n", None),
        (f"---\nlicense: {'x' * 300}\n---\n", None),
        ("", None),
    ],
)
def test_the_license_of_the_base(card: str, expected: str | None, tmp_path: Path) -> None:
    """One line in the front matter of its card, or nothing."""
    (tmp_path / "README.md").write_text(card)
    assert license_of(tmp_path) == expected


def test_the_license_goes_into_the_pack(base: Path) -> None:
    """As the base's, not as the adapter's, which nobody has told."""
    assert packed(base).manifest.base_license is None
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert (packed(base).manifest.base_license, packed(base).manifest.license) == ("apache-2.0", None)


def test_twice_the_same_bytes(base: Path, tmp_path: Path) -> None:
    """Two models of one base, two folders: the same manifest."""
    for name in ("a", "b"):
        packed(base, name="p").write(tmp_path / name)
    assert (tmp_path / "a" / m.FILE_NAME).read_bytes() == (tmp_path / "b" / m.FILE_NAME).read_bytes()


def test_a_model_in_memory_says_what_it_can() -> None:
    """No folder: no tokenizer, no license, no files; the class of the model and its structure are there. It
    is written and read.
    """
    model = adapt(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)), LoRA(r=1))
    manifest = save(model, None).manifest
    assert (manifest.tokenizer, manifest.base_license, manifest.base.files, manifest.base.dims) == (
        None,
        None,
        None,
        None,
    )
    assert manifest.base.architecture == "Sequential"
    assert manifest.base.content is not None
    assert set(manifest.training) == {"framework_versions"}


def test_what_training_claims(tiny_bert: Path, tmp_path: Path) -> None:
    """Data by digest, objective, steps, seed, precision and versions, as the run had them."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"text": f"w{number}", "label": "ab"[number % 2]}) + "\n" for number in range(4))
    )
    (pack,) = train(
        {
            "task": "text-classification",
            "model_name_or_path": str(tiny_bert),
            "train_file": str(rows),
            "output_dir": str(tmp_path / "pack"),
            "max_steps": 2,
            "seed": 5,
            "r": 2,
        }
    )
    claims = adapterpack.load(tmp_path / "pack").manifest.training
    assert claims["datasets"] == [
        {"id": "rows.jsonl", "revision": None, "digest": f"sha256:{sha256(rows.read_bytes())}"}
    ]
    assert {
        "objective": "text-classification",
        "steps": 2,
        "seed": 5,
        "precision": "float32",
        "rows": 4,
    }.items() <= claims.items()
    assert claims["framework_versions"]["torch"] == torch.__version__
    assert set(claims["framework_versions"]) == {"adapterpack", "torch", "transformers"}
    assert pack.manifest.tokenizer is not None


@pytest.mark.parametrize("name", FAMILIES)
def test_a_whole_checkpoint_has_no_new_head(name: str, tmp_path: Path) -> None:
    """However a family stores and ties its weights, what its checkpoint holds is not taken for what every
    load draws anew.
    """
    FAMILIES[name].build().save_pretrained(tmp_path / name)
    assert drawn_modules(FAMILIES[name].load(tmp_path / name)) == []


def test_a_table_that_its_class_computes_is_not_new(tmp_path: Path) -> None:
    """Marian's positions are in no checkpoint, and no pack holds them."""
    config = MarianConfig(
        vocab_size=96,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=32,
        pad_token_id=0,
        decoder_start_token_id=0,
    )
    MarianMTModel(config).save_pretrained(tmp_path)
    model = MarianMTModel.from_pretrained(tmp_path)
    assert drawn_modules(model) == []
    ids = torch.tensor([[5, 17, 40]])
    model = shake(adapt(model, LoRA(r=2), "a"), 0.3)
    assert model(input_ids=ids, decoder_input_ids=ids).logits.isfinite().all()


def test_save_pretrained_of_an_adapted_model_writes_its_packs(tiny_llama: Path, tmp_path: Path) -> None:
    """PEFT loads one as it is; of several each has a folder; a taken folder and a push are refused."""
    load_base = AutoModelForCausalLM.from_pretrained
    ids = torch.tensor([[5, 17, 40]])
    model = shake(adapt(load_base(tiny_llama), LoRA(r=2), "a"), 0.3)
    model.save_pretrained(tmp_path / "one")
    ours = attach(load_base(tiny_llama), load(tmp_path / "one"))
    theirs = PeftModel.from_pretrained(load_base(tiny_llama), tmp_path / "one")
    right = model(input_ids=ids).logits
    for other in (ours, theirs):
        torch.testing.assert_close(other(input_ids=ids).logits, right, rtol=0, atol=1e-5)
    with pytest.raises(OutputExists):
        model.save_pretrained(tmp_path / "one")
    adapt(model, LoRA(r=3), "b")
    model.save_pretrained(tmp_path / "both", save_function=None, state_dict=None)  # as accelerate's users do
    found = {path.name: load(path).method.name for path in (tmp_path / "both").iterdir()}
    assert found == dict.fromkeys("ab", "lora")
    with pytest.raises(Unsupported, match="adapterpack push"):
        model.save_pretrained(tmp_path / "pushed", push_to_hub=True)
    model.save_pretrained(tmp_path / "of a trainer", state_dict=None, is_main_process=True)
    assert [path.name for path in (tmp_path / "of a trainer").iterdir()] == ["model.safetensors"]
