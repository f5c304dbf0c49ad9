"""A folder that onnxruntime-genai's builder and Olive made, run by adapterpack, by its engine for
servers, and by onnxruntime-genai, against torch: ``python olive_folder.py PYTHON``.

``PYTHON`` is that of an environment with olive-ai, onnxruntime-genai, torch, transformers and peft, in which this
file makes a tiny model with two adapters, builds its graph, has Olive turn the first adapter's factors into
inputs, and generates.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROMPTS = [[1, 5, 6, 7, 8, 9], [1, 10, 11]]
TOKENS = 8
NAMES = ("one", "two")
SIZES = {"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "vocab_size": 96}
"""No layer is as wide as the vocabulary but the head: the builder takes one that is for the head."""


def make(folder: Path) -> None:
    """Writes the model, its adapters, the folder, and the tokens of torch."""
    import torch
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = {
        word: number for number, word in enumerate(["<p>", "<s>", "</s>", *(f"w{i}" for i in range(93))])
    }
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<p>"))
    special = {"pad_token": "<p>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "base")
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    base = LlamaForCausalLM(LlamaConfig(**SIZES, **heads, **ids, tie_word_embeddings=False))
    for value in base.parameters():
        if value.ndim > 1:
            value.data.normal_(std=0.3)
    base.save_pretrained(folder / "base")
    answers: dict[str, Any] = {"": generated(base)}
    for name in NAMES:
        fresh = LlamaForCausalLM.from_pretrained(folder / "base")
        targets = ["q_proj", "v_proj", "down_proj"]
        model = get_peft_model(fresh, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
        for key, value in model.named_parameters():
            if "lora_" in key:
                value.data.normal_(std=0.4)
        model.save_pretrained(folder / name)
        answers[name] = generated(model)
    (folder / "torch.json").write_text(json.dumps(answers))
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "fp32", "-e", "cpu"]
    places = ["-i", folder / "base", "-o", folder / "made", "-c", folder / "cache"]
    options = ["--extra_options", f"adapter_path={folder / 'one'}"]
    subprocess.run([*map(str, [*builder, *places, *options])], check=True, stdout=subprocess.DEVNULL)
    olive(folder)


def generated(model: Any) -> list[list[int]]:
    """Torch's greedy tokens, each prompt by itself."""
    import torch

    answers = []
    for prompt in PROMPTS:
        made = model.eval().generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False, pad_token_id=0
        )
        answers.append(made[0, len(prompt) :].tolist())
    return answers


def olive(folder: Path) -> None:
    """Has Olive make inputs of the factors, and onnxruntime-genai generate in the folder."""
    import onnxruntime_genai as og
    from olive.model import ONNXModelHandler
    from olive.passes.olive_pass import create_pass_from_dict
    from olive.passes.onnx.extract_adapters import ExtractAdapters

    extract = create_pass_from_dict(ExtractAdapters, {"make_inputs": True}, disable_search=True)
    extract.run(ONNXModelHandler(str(folder / "made" / "model.onnx")), str(folder / "olive"))
    for path in (folder / "olive").glob("model.onnx*"):
        path.replace(folder / "made" / path.name)
    model = og.Model(str(folder / "made"))
    adapters = og.Adapters(model)
    adapters.load(str(folder / "olive" / "adapter_weights.onnx_adapter"), "one")
    answers: dict[str, Any] = {}
    for name in ("", "one"):
        answers[name] = []
        for prompt in PROMPTS:
            params = og.GeneratorParams(model)
            params.set_search_options(do_sample=False, max_length=len(prompt) + TOKENS)
            generator = og.Generator(model, params)
            if name:
                generator.set_active_adapter(adapters, name)
            generator.append_tokens(prompt)
            while not generator.is_done():
                generator.generate_next_token()
            answers[name].append([int(token) for token in generator.get_sequence(0)][len(prompt) :])
    (folder / "genai.json").write_text(json.dumps(answers))


def main(python: str) -> int:
    """0 if the base, Olive's adapter and one of PEFT give torch's tokens, alone and in one batch."""
    from adapterpack import Engine, Session
    from adapterpack.cli.options import load_adapter
    from adapterpack.engine_graph.genai_engine import served_folder

    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.environ["ADAPTERPACK_CACHE"] = str(folder / "ours")
        subprocess.run([python, __file__, "--make", scratch], check=True, stdout=subprocess.DEVNULL)
        wanted, theirs = (json.loads((folder / f"{name}.json").read_text()) for name in ("torch", "genai"))
        session = Session(folder / "made", "cpu")
        given = {"one": folder / "olive" / "adapter_weights.onnx_adapter", "two": folder / "two"}
        for name, path in given.items():
            session.load(load_adapter(f"{name}={path}"), allow_structural=True)
        engine = Engine(served_folder(folder / "made"), "cpu")
        for name, path in given.items():
            engine.adapters.load(load_adapter(f"{name}={path}"))
        rows = {
            engine.add(prompt, name or None, max_new_tokens=TOKENS): (name, at)
            for name in ("", *NAMES)
            for at, prompt in enumerate(PROMPTS)
        }
        served: dict[tuple[str, int], list[int]] = {place: [] for place in rows.values()}
        while engine.busy:
            for event in engine.step():
                served[rows[event.request]] += [] if event.token is None else [event.token]
        names = [*("", *NAMES)] * len(PROMPTS)
        prompts = [prompt for prompt in PROMPTS for _ in range(1 + len(NAMES))]
        answers = session.generate(prompts, [name or None for name in names], max_new_tokens=TOKENS)
        for name in ("", *NAMES):
            found = [list(answer.ids) for answer, own in zip(answers, names, strict=True) if own == name]
            by_engine = [served[name, at] for at in range(len(PROMPTS))]
            right = found == by_engine == wanted[name] and theirs.get(name, found) == found
            wrong += not right
            sys.stdout.write(f"{'ok' if right else 'WRONG':6}olive's folder, {name or 'the base'}: {found}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(make(Path(sys.argv[2])) if sys.argv[1] == "--make" else main(sys.argv[1]))
