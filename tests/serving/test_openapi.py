"""schemathesis asks real servers what their OpenAPI documents promise, and much that they do not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from servers import ANN, Served

from adapterpack.serving.openai.requests import Sampled

EXAMPLES = 2
"""Of each route, besides those at the bounds of its schemas."""
ASKED = ("model", "max_tokens", "stream", "n")
"""Of what completions have in common with chats, whose fields are those of one class: all else is tried in
chats alone.
"""
# a document cannot say all: two forms of one answer, a text longer than the context
LEFT_OUT = ("positive_data_acceptance",)


def checked(server: Served, folder: Path) -> None:
    """Runs schemathesis against a server, with a document whose names of models are such that work is done.
    It may not find an error of the server, an answer that its document does not have, or a request taken that
    the document forbids.
    """
    document = server.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    if plain := schemas.get("CompletionRequest"):
        chat = schemas["ChatRequest"]["properties"]
        plain["properties"] = {
            name: field
            for name, field in plain["properties"].items()
            if name in ASKED or chat.get(name) != field
        }
        assert set(Sampled.__struct_fields__) - set(ASKED) <= chat.keys() - plain["properties"].keys()
    for schema in schemas.values():
        fields: dict[str, Any] = schema.get("properties", {})
        if "model" in fields and fields.keys() & {"messages", "prompt", "input", "documents"}:
            fields["model"] = {"enum": ["alpha", "base", "nobody"]}
    (folder / "openapi.json").write_text(json.dumps(document))
    command = [
        sys.executable,
        "-m",
        "schemathesis.cli",
        "run",
        str(folder / "openapi.json"),
        "--url",
        server.address,
        "--header",
        f"Authorization: Bearer {ANN}",
        "--max-examples",
        str(EXAMPLES),
        "--seed",
        "1",
        "--phases",
        "examples,coverage,fuzzing",
        "--exclude-checks",
        ",".join(LEFT_OUT),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, cwd=folder)
    assert done.returncode == 0, done.stdout[-20_000:]
    assert "bug" not in server.log.read_text()
    assert "Traceback" not in server.log.read_text()
    assert not [line for line in server.audited() if line["status"] >= 500]
    assert sum(line["status"] == 200 for line in server.audited()) > EXAMPLES


@pytest.mark.long
def test_texts(start: Callable[..., Served], tmp_path: Path) -> None:
    """A server of texts with three adapters."""
    checked(start(max_length=48), tmp_path)


@pytest.mark.long
def test_vectors(features: Path, launch: Callable[..., Served], tmp_path: Path) -> None:
    """A server of an encoder: embeddings, and the Open Inference Protocol."""
    checked(launch(features), tmp_path)
