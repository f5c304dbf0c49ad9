"""Answers of a peer to prompts of token ids, and its speed: run by `quantize.py` in the peer's environment, with what it wants on stdin.

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

    def __call__(self, prompt: list[int], new: int) -> list[int]:
        """Greedy tokens, end tokens or not."""
        params = self.og.GeneratorParams(self.model)
        length = len(prompt) + new
        params.set_search_options(do_sample=False, min_length=length, max_length=length)
        generator = self.og.Generator(self.model, params)
        generator.append_tokens(prompt)
        made = []
        for _ in range(new):
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

    def __call__(self, prompt: list[int], new: int) -> list[int]:
        """Greedy tokens, end tokens or not."""
        answer = self.server.handle_completions({"prompt": prompt, "n_predict": new, "temperature": 0, "ignore_eos": True,
                                                 "cache_prompt": False, "return_tokens": True, "stream": False})
        found: Any = json.loads(answer) if isinstance(answer, str | bytes) else answer
        if "tokens" in found:
            return [int(token) for token in found["tokens"]]
        raise RuntimeError(f"no tokens in the answer: {json.dumps(found)[:600]}")


def main() -> None:
    model, wanted = {"genai": Genai, "llama": Llama}[sys.argv[1]](sys.argv[2]), json.load(sys.stdin)

    def seconds(prompt: list[int], new: int) -> float:
        started = time.perf_counter()
        model(prompt, new)
        return time.perf_counter() - started

    result: dict[str, Any] = {"answers": [model(prompt, wanted["new"]) for prompt in wanted["prompts"]]}
    if wanted["rounds"]:
        short, long, many = wanted["short"], wanted["long"], wanted["many"]
        one, more, read = (min(seconds(*what) for _ in range(wanted["rounds"])) for what in ((short, 1), (short, many), (long, 1)))
        result |= {"decode": (many - 1) / (more - one), "prefill": len(long) / read}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
