"""Runs inside a virtual environment with ``onnxruntime-genai`` and nothing of ours: loads a folder,
generates, prints JSON.

python genai_child.py FOLDER TOKENS PROMPT [ADAPTER ...]
"""

import json
import sys
from pathlib import Path

import onnxruntime_genai as og


def main(folder: Path, tokens: int, prompt: str, names: list[str]) -> None:
    """Greedy answers of the base, each adapter, and the base again."""
    model = og.Model(str(folder))
    tokenizer = og.Tokenizer(model)
    adapters = og.Adapters(model)
    for name in names:
        adapters.load(str(folder / "adapters" / f"{name}.onnx_adapter"), name)
    ids = [int(each) for each in tokenizer.encode(prompt)]
    answers = {}
    for name in ["", *names, " again"]:
        params = og.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=len(ids) + tokens)
        generator = og.Generator(model, params)
        if name in names:
            generator.set_active_adapter(adapters, name)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
        answers[name] = [int(each) for each in generator.get_sequence(0)][len(ids) :]
    print(
        json.dumps(
            {
                "version": og.__version__,
                "prompt": ids,
                "answers": answers,
                "text": tokenizer.decode(answers[""]),
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
