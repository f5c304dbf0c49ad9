"""Runs a command beside two servers of small models: ``python tests/serving/with_servers.py [--refusals] COMMAND...``.

The command finds a server of texts at ``OPENAI_BASE_URL`` and ``ANTHROPIC_BASE_URL`` and one of embeddings at
``EMBEDDINGS_BASE_URL``, both with the key ``OPENAI_API_KEY``; each has an adapter ``alpha``, the first also
``beta``. ``TOKENIZER`` is the folder of the first one's tokenizer. A request that is refused is a failure, unless the
command asks for ``--refusals``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from encoder_packs import packed
from servers import ANN, Served, begin
from test_templates import SHAPES
from tiny import write_bundle, write_model, write_packs

from adapterpack import export
from adapterpack.demos import MINILM, SMOLLM2, fetch


def main(command: list[str]) -> int:
    """The command's exit code; 1 where a server refused something that it was not to refuse."""
    refusals = command[0] == "--refusals"
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)

        def served(bundle: Path, **options: Any) -> Served:
            place = folder / f"server-{bundle.name}"
            place.mkdir()
            one = begin(bundle, place, **options)
            stack.callback(one.process.wait, 10)
            stack.callback(one.process.kill)
            return one

        model = write_model(folder / "model", fetch(SMOLLM2))
        (model / "chat_template.jinja").write_text(SHAPES["Qwen with tools"][0])
        packs = write_packs(folder / "packs", model, ("alpha", "beta"))
        texts = served(
            write_bundle(folder / "texts", model, [packs / "alpha", packs / "beta"]), sampling="greedy"
        )
        pack = packed(fetch(MINILM), folder, "feature-extraction", "alpha", r=2, alpha=1)
        export(fetch(MINILM), [pack], folder / "vectors", mode="bank", task="feature-extraction")
        vectors = served(folder / "vectors")
        environment = {
            **os.environ,
            "OPENAI_BASE_URL": f"{texts.address}/v1",
            "EMBEDDINGS_BASE_URL": f"{vectors.address}/v1",
            "OPENAI_API_KEY": ANN,
            "ANTHROPIC_BASE_URL": texts.address,
            "ANTHROPIC_API_KEY": ANN,
            "TOKENIZER": str(model),
        }
        code = subprocess.run(command[refusals:], env=environment, check=False, timeout=600).returncode
        refused = [line for one in (texts, vectors) for line in one.audited() if line["status"] != 200]
        if refused and not refusals:
            print("refused:", *refused, sep="\n")  # noqa: T201
            return code or 1
        return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
