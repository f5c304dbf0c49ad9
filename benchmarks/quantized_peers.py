"""Answers of a peer to prompts of token ids, and its speed: run by `quantize.py` in the peer's environment,
with what it wants on stdin.

PEER/bin/python -P benchmarks/quantized_peers.py genai FOLDER < wanted.json
PEER/bin/python -P benchmarks/quantized_peers.py llama FILE.gguf < wanted.json
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

THREADS, CONTEXT = 2, 1024


class Genai:
    """onnxruntime-genai on a folder of its builder."""

    def __init__(self, model: str) -> None:
        import onnxruntime_genai as og

        self.og, self.model = og, og.Model(model)

    def __call__(self, prompt: list[int], new: int, whole: bool = True) -> list[int]:
        """Greedy tokens, of so many if it is to be whole, else up to the end token."""
        params = self.og.GeneratorParams(self.model)
        length = len(prompt) + new
        params.set_search_options(do_sample=False, min_length=length if whole else 0, max_length=length)
        generator = self.og.Generator(self.model, params)
        generator.append_tokens(prompt)
        made = []
        while len(made) < new and not generator.is_done():
            generator.generate_next_token()
            made.append(int(generator.get_next_tokens()[0]))
        return made


class Llama:
    """llama.cpp's server in the process, by xllamacpp."""

    def __init__(self, model: str) -> None:
        import xllamacpp as xlc

        params = xlc.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel, params.warmup = model, CONTEXT, 1, True
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = THREADS
        self.server = xlc.Server(params)

    def __call__(self, prompt: list[int], new: int, whole: bool = True) -> str:
        """The text of greedy tokens, of so many if it is to be whole, else up to the end token."""
        answer = self.server.handle_completions(
            {
                "prompt": prompt,
                "max_tokens": new,
                "temperature": 0,
                "ignore_eos": whole,
                "cache_prompt": False,
                "stream": False,
            }
        )
        found: Any = json.loads(answer) if isinstance(answer, str | bytes) else answer
        return str(found["choices"][0]["text"])


def main() -> None:
    model, wanted = {"genai": Genai, "llama": Llama}[sys.argv[1]](sys.argv[2]), json.load(sys.stdin)

    def seconds(prompt: list[int], new: int) -> float:
        started = time.perf_counter()
        model(prompt, new)
        return time.perf_counter() - started

    result: dict[str, Any] = {
        "answers": [model(prompt, wanted["new"], whole=False) for prompt in wanted["prompts"]]
    }
    if wanted["rounds"]:
        short, long, many = wanted["short"], wanted["long"], wanted["many"]
        one, more, read = (
            min(seconds(*what) for _ in range(wanted["rounds"]))
            for what in ((short, 1), (short, many), (long, 1))
        )
        result |= {"decode": (many - 1) / (more - one), "prefill": len(long) / read}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
