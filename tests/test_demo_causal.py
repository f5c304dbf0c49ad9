"""The demo of a language model: the real command on a real chat model; what it prints is what it promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from demo_command import demo
from shipped_schemas import fits

pytestmark = [pytest.mark.long, pytest.mark.timeout(2400)]  # it trains, on whatever machine this is


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> dict[str, Any]:
    return demo(tmp_path_factory.mktemp("demo") / "causal", "--causal-lm")


def test_the_result_fits_its_schema(causal: dict[str, Any]) -> None:
    """It prints what ``report.v1`` says."""
    assert fits(causal, "report.v1")


def test_the_language_model_learns_the_form(causal: dict[str, Any]) -> None:
    """Before: no answer is the wanted JSON. After: most are, exactly, and all are valid."""
    assert causal["exact_match"]["before"] <= 0.05
    assert causal["exact_match"]["after"] >= 0.6
    assert causal["valid_json"]["after"] >= 0.9


def test_onnx_runtime_says_what_torch_says(causal: dict[str, Any]) -> None:
    """Greedy decoding gives the same tokens on both runtimes, with the adapter and without, in float32."""
    assert causal["token_agreement"] == 1.0
    assert causal["tokens_compared"] >= 200
    assert causal["speed"]["onnx"]["tokens_per_second"] > 0


def test_the_server_says_what_the_session_says(causal: dict[str, Any]) -> None:
    """The first example by OpenAI's client, without the adapter and with it."""
    served, example = causal["served"], causal["examples"][0]
    assert served["client"].startswith("openai ")
    assert [(row["adapter"], row["answer"]) for row in served["rows"]] == [
        (None, example["base"]),
        ("orders", example["adapter"]),
    ]
