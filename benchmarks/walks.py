"""How many files and calls of the package an operation passes through: ``python benchmarks/walks.py
[--json]``.

A newcomer who follows a call reads those files. Counted are the functions of adapterpack that run, by the
file that defines them, after everything is imported; a first run warms what is cached. The model is a tiny
random Llama, the adapter a LoRA on all linear layers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import peft
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import adapterpack
from adapterpack import LoRA

PACKAGE = str(Path(adapterpack.__file__).parent)
PROMPT = [{"role": "user", "content": "where is my parcel"}]
CHAT = json.dumps({"model": "pack", "messages": PROMPT, "stream": True, "max_tokens": 4}).encode()
TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"


class Walk:
    """Counts the files of the package in which functions run, and their calls, in every thread that it sees
    begin.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.counting = False

    def __enter__(self) -> Walk:
        threading.setprofile(self._count)
        sys.setprofile(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]

    def _count(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if (
            self.counting
            and event == "call"
            and code.co_filename.startswith(PACKAGE)
            and code.co_name != "<module>"
        ):
            self.calls[code.co_filename.removeprefix(PACKAGE + "/")] += 1

    def result(self) -> dict[str, Any]:
        """The number of files, of calls, and of the calls in each file."""
        return {
            "files": len(self.calls),
            "calls": self.calls.total(),
            "by_file": dict(self.calls.most_common()),
        }


def walk(operation: Callable[[], Any]) -> dict[str, Any]:
    """What an operation passes through the second time."""
    operation()
    with Walk() as counted:
        counted.counting = True
        operation()
    return counted.result()


def walk_request(bundle: Path) -> dict[str, Any]:
    """What a server passes through for a streamed chat request, the second one of its kind."""
    with Walk() as counted, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()

        def ask() -> None:
            address = f"http://127.0.0.1:{port}/v1/chat/completions"
            request = urllib.request.Request(address, CHAT, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                answer.read()

        def client() -> None:
            try:
                ask()
                counted.counting = True
                ask()
                counted.counting = False
            finally:
                os.kill(os.getpid(), signal.SIGINT)

        with contextlib.suppress(KeyboardInterrupt):
            adapterpack.serve(
                bundle, port=port, audit=None, ready=lambda _: threading.Thread(target=client).start()
            )
    return counted.result()


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of a few words, with a template for chats."""
    words = [
        "[PAD]",
        "[UNK]",
        "[EOS]",
        "where",
        "is",
        "my",
        "parcel",
        *(f"w{number}" for number in range(57)),
    ]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        eos_token="[EOS]",
        unk_token="[UNK]",
        chat_template=TEMPLATE,
    ).save_pretrained(folder)


def measure() -> dict[str, dict[str, Any]]:
    """The walks by their names."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = folder / "base"
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            max_position_embeddings=64,
        )
        LlamaForCausalLM(config).save_pretrained(base)
        write_tokenizer(base)
        model = adapterpack.adapt(LlamaForCausalLM.from_pretrained(base), LoRA(r=2), "a")
        adapterpack.save(model, folder / "pack", base=base)
        lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        other = peft.get_peft_model(LlamaForCausalLM.from_pretrained(base), lora)
        other.save_pretrained(folder / "peft")
        number = iter(range(99))
        ids = np.array([[5, 6, 7]])
        bundle = folder / "bundle"
        adapterpack.export(base, [folder / "pack"], bundle, mode="bank")

        def export_and_run() -> None:
            out = folder / f"bundle-{next(number)}"
            adapterpack.export(base, [folder / "pack"], out, mode="bank")
            adapterpack.Session(out).run({"input_ids": ids}, adapters=["pack"])

        def load_and_attach() -> None:
            adapterpack.attach(LlamaForCausalLM.from_pretrained(base), adapterpack.load(folder / "pack"))

        operations: dict[str, Callable[[], Any]] = {
            "save": lambda: adapterpack.save(model, folder / f"again-{next(number)}", base=base),
            "load and attach": load_and_attach,
            "load a PEFT folder": lambda: adapterpack.load(folder / "peft"),
            "export and run": export_and_run,
            "run one prompt": lambda: list(
                adapterpack.run(
                    bundle, [{"prompt": "where is my parcel"}], adapters=["pack"], max_new_tokens=4
                )
            ),
        }
        return {name: walk(operation) for name, operation in operations.items()} | {
            "one streamed chat request": walk_request(bundle)
        }


def main() -> None:
    """Prints a line an operation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = measure()
    if args.json:
        print(json.dumps(result, indent=2))
        return
    for name, found in result.items():
        print(f"{name}: {found['files']} files, {found['calls']} calls")


if __name__ == "__main__":
    main()
