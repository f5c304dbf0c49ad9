"""A server as one writes it around a library that has one adapter at a time: Starlette (as FastAPI is), a
lock, PEFT or onnxruntime-genai.

It runs in the environment of that library, with nothing of ours. ``POST /v1/completions`` streams the tokens
of one request, and the others wait; ``POST /batch`` makes the answers of several prompts at once, where the
library can. Both take token ids and greedy answers of a fixed length, as benchmarks ask for them.

    python one_adapter_server.py peft --model BASE --adapter one=PACK --adapter two=PACK --port 8000
    python one_adapter_server.py genai --model FOLDER --adapter one=FILE.onnx_adapter --port 8000
"""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route


class Peft:
    """PEFT on transformers in float32; a mixed batch is its ``adapter_names``."""

    def __init__(self, model: str, adapters: dict[str, str]) -> None:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        self.torch = torch
        torch.set_num_threads(2)
        whole, self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval(), None
        for name, folder in adapters.items():
            if self.model is None:
                self.model = PeftModel.from_pretrained(whole, folder, adapter_name=name).eval()
            else:
                self.model.load_adapter(folder, adapter_name=name)

    def tokens(self, adapter: str | None, prompt: list[int], count: int) -> Iterator[int]:
        """One greedy answer, token by token."""
        torch, cache, ids = self.torch, None, self.torch.tensor([prompt])
        if adapter is not None:
            self.model.set_adapter(adapter)
        for _ in range(count):
            with torch.inference_mode():
                if adapter is None:
                    with self.model.disable_adapter():
                        output = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                else:
                    output = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, ids = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
            yield int(ids)

    def batch(self, adapters: list[str | None], prompts: list[list[int]], count: int) -> None:
        """Greedy answers of prompts of one length."""
        torch, distinct = self.torch, list(dict.fromkeys(adapters))
        ids = torch.tensor(prompts)
        options = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": count,
            "min_new_tokens": count,
            "do_sample": False,
            "pad_token_id": 0,
        }
        with torch.inference_mode():
            if distinct == [None]:
                with self.model.disable_adapter():
                    self.model.generate(**options)
            elif len(distinct) == 1:
                self.model.set_adapter(distinct[0])
                self.model.generate(**options)
            else:
                self.model.generate(**options, adapter_names=[name or "__base__" for name in adapters])


class Genai:
    """onnxruntime-genai; a mixed batch is one answer after another, since a generator has one adapter for all
    rows.
    """

    def __init__(self, model: str, adapters: dict[str, str]) -> None:
        import onnxruntime_genai as og

        self.og, self.model = og, og.Model(model)
        self.adapters = og.Adapters(self.model) if adapters else None
        for name, file in adapters.items():
            self.adapters.load(file, name)

    def _generator(self, adapter: str | None, prompts: list[list[int]], count: int) -> Any:
        params = self.og.GeneratorParams(self.model)
        length = len(prompts[0]) + count
        params.set_search_options(
            do_sample=False, min_length=length, max_length=length, batch_size=len(prompts)
        )
        generator = self.og.Generator(self.model, params)
        if adapter is not None:
            generator.set_active_adapter(self.adapters, adapter)
        generator.append_tokens(
            [token for prompt in prompts for token in prompt] if len(prompts) == 1 else prompts
        )
        return generator

    def tokens(self, adapter: str | None, prompt: list[int], count: int) -> Iterator[int]:
        """One greedy answer, token by token."""
        generator = self._generator(adapter, [prompt], count)
        for _ in range(count):
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])

    def batch(self, adapters: list[str | None], prompts: list[list[int]], count: int) -> None:
        """Greedy answers of prompts of one length."""
        groups = [prompts] if len(set(adapters)) == 1 else [[prompt] for prompt in prompts]
        for adapter, group in zip(adapters, groups, strict=False):
            generator = self._generator(adapter, group, count)
            for _ in range(count):
                generator.generate_next_token()


LIBRARIES = {"peft": Peft, "genai": Genai}


def application(library: Any) -> Starlette:
    """The server around a library: one request at a time has it, in threads."""
    turn = threading.Lock()

    def events(body: dict[str, Any]) -> Iterator[str]:
        adapter = None if body["model"] == "base" else body["model"]
        with turn:
            for token in library.tokens(adapter, body["prompt"], body["max_tokens"]):
                yield f"data: {json.dumps({'token': token})}\n\n"
        yield "data: [DONE]\n\n"

    def whole(body: dict[str, Any]) -> Iterator[str]:
        with turn:
            library.batch(body["adapters"], body["prompts"], body["tokens"])
        yield "data: {}\n\n"

    async def completions(request: Request) -> StreamingResponse:
        return StreamingResponse(events(await request.json()), media_type="text/event-stream")

    async def batch(request: Request) -> StreamingResponse:
        return StreamingResponse(whole(await request.json()), media_type="text/event-stream")

    async def health(_: Request) -> Response:
        return Response()

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/batch", batch, methods=["POST"]),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--port", type=int, required=True)
    args = parser.parse_args()
    library = LIBRARIES[args.library](args.model, dict(each.split("=", 1) for each in args.adapter))
    uvicorn.run(application(library), port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
