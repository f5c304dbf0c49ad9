"""A language model learns the language of a field from plain text, and becomes one checkpoint without a trace
of adapterpack.

python examples/cookbook/domain_adaptation.py SmolLM2-135M-Instruct notes.txt packs/notes models/notes
"""

import math
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import adapterpack


def perplexity(model: torch.nn.Module, tokenizer, texts: list[str]) -> float:
    """How surprised the model is by a token of the texts, on average."""
    total, count = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=64).input_ids
        if ids.shape[1] > 1:
            with torch.no_grad():
                total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    return math.exp(total / count)


def main(base: str, text: str, out: str, merged: str, steps: int = 200) -> dict[str, float]:
    """Trains on nine tenths of the lines, measures on the rest, and merges; returns the perplexity before and
    after.
    """
    (pack,) = adapterpack.train(
        {
            "model_name_or_path": base,
            "task": "text-generation",
            "train_file": text,  # plain text: every token is learned
            "val_set_size": 0.1,
            "output_dir": out,
            "r": 16,
            "target_modules": "all-linear",
            "learning_rate": 3e-4,
            "max_steps": steps,
            "max_length": 64,
        }
    )
    lines = [line for line in Path(text).read_text("utf-8").splitlines() if line.strip()]
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base).eval()
    result = {"before": perplexity(model, tokenizer, lines)}
    adapterpack.attach(model, pack)
    result["after"] = perplexity(model, tokenizer, lines)
    # a checkpoint that transformers, vLLM and llama.cpp's converter read
    adapterpack.merge(base, [pack], merged)
    return result


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(__doc__)
    print(main(*sys.argv[1:5], *map(int, sys.argv[5:])))
