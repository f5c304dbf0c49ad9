"""The model card under hostile names: whatever a pack says, the card has the same headings, tables and links,
and shows it as text.
"""

from __future__ import annotations

import dataclasses
import doctest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hubs import make_pack
from markdown_it import MarkdownIt
from markdown_it.token import Token
from msgspec.structs import replace

import adapterpack
from adapterpack.errors import printable
from adapterpack.hub import card as cards
from adapterpack.hub.card import MARK, bundle_card, pack_card
from adapterpack.hub.transport import names
from adapterpack.pack.validate.checks.finding import Finding, Report

pytestmark = pytest.mark.fast

AT = names.parse("hf://org/tickets")
HOSTILE = {
    "heading": "x\n\n# Owned", "heading alone": "# Owned", "underlined": "x\n===", "link": "[click](http://evil.example)",
    "image": "![i](http://evil.example/x.png)", "reference": "[a]\n\n[a]: http://evil.example", "address": "<http://evil.example>",
    "script": "<script>alert(1)</script>", "markup": '<img src=x onerror="alert(1)">', "comment": "<!-- a", "entity": "&lt;b&gt; &#35;",
    "cells": "a | b |\n| --- | --- |\n| c | d", "escaped cell": "a\\| b", "backslash": "a\\", "fence": "```\n\n# Owned\n", "tildes": "~~~",
    "rule": "---", "item": "- item", "plus": "+ item", "number": "1. item", "quote": "> quote", "indented": "\n\n        code",
    "emphasis": "**bold** _em_ `code` ~~gone~~", "formula": "$x$", "terminal": "\x1b[31mred\u202eder",
}  # fmt: skip
PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def card(text: str) -> str:
    """A pack that says ``text`` wherever a pack may say what it likes, and a report that repeats it."""
    line = " ".join(text.split())
    metric = {"name": line, "value": 0.5, "dataset": text, "harness": text, f"about {text}": text}
    pack = make_pack("tickets", metrics=(metric,), training={f"note {text}": text, "nested": {text: [text]}})
    manifest = replace(
        pack.manifest,
        pack=replace(pack.manifest.pack, description=text),
        task=replace(pack.manifest.task, labels=(text, "b")),
    )
    pack = dataclasses.replace(pack, manifest=manifest)
    report = Report(
        "pack", "here", pack.id, (Finding("AP000", "warning", "here", text),), (f"{line}, the rest: why",)
    )
    return pack_card(pack, AT, report)


def shared(text: str, task: str = "text-classification") -> str:
    """The card of a bundle whose adapters and labels are called so."""
    adapters = (SimpleNamespace(name=text, slot=1, labels=(text, "b"), pack=text),)
    bundle = SimpleNamespace(quantization=None, task=task, mode="bank", adapters=adapters)
    return bundle_card(bundle, AT, "org/base", "apache-2.0", Report("bundle", "here", None, ()))


def parsed(card: str) -> list[Token]:
    """The tokens of the body, those inside of lines among them."""
    _, header, body = card.split("---\n", 2)
    assert isinstance(yaml.safe_load(header), dict)
    assert body.startswith(MARK)
    return [inner for token in PARSER.parse(body) for inner in (token, *(token.children or ()))]


def structure(card: str) -> list[Any]:
    """Elements and where links lead; text is left out, and with it where lines are cut into pieces of
    text.
    """
    return [
        (token.type, token.tag, token.attrs.get("href"))
        for token in parsed(card)
        if token.type not in {"text", "text_special"}
    ]


def shown(card: str) -> str:
    return " ".join(
        "".join(token.content for token in parsed(card) if token.type in {"text", "text_special"}).split()
    )


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("make", [card, shared])
def test_a_name_is_shown_and_adds_nothing_to_the_card(make: Any, text: str) -> None:
    """As column of a metric, its value, a key of the training, the description, a label, the message of a
    warning.
    """
    assert structure(make(text)) == structure(make("plain"))
    assert "".join(printable(" ".join(text.split())).split()) in "".join(shown(make(text)).split())
    assert printable(make(text)) == make(text)


def test_the_table_of_metrics_has_their_columns() -> None:
    """In the order in which the metrics name them, as text."""
    assert "| name | value | dataset | harness | about \\[a\\](b) |" in card("[a](b)")


@pytest.mark.parametrize(
    ("task", "given"),
    [
        ("text-classification", '--prompt "..."'),
        ("image-classification", "--image picture.png"),
        ("automatic-speech-recognition-ctc", "--audio recording.wav"),
    ],
)
def test_what_a_card_gives_a_model_is_what_it_reads(task: str, given: str) -> None:
    pack = make_pack("tickets")
    named = replace(pack.manifest, task=replace(pack.manifest.task, type=task))
    text = pack_card(dataclasses.replace(pack, manifest=named), AT, Report("pack", "here", pack.id, ()))
    assert f"run bundle --adapter tickets {given}\n" in text
    assert f"run bundle {given}\n" in shared("a", task)


def test_the_losses_of_a_training_are_drawn() -> None:
    """A column for each point, as tall as its share of the largest; the table of the training leaves losses
    and evaluations out.
    """
    points = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 0.5}]
    pack = make_pack(
        "tickets", training={"steps": 3, "losses": points, "evaluations": [{"step": 3, "loss": 0.25}]}
    )
    card = pack_card(pack, AT, Report("pack", "here", pack.id, ()))
    [drawn] = [
        token.content.splitlines() for token in parsed(card) if token.type == "fence" and token.info == "text"
    ]
    assert [line[9:] for line in drawn[:8]] == 4 * ["█"] + 2 * ["██"] + 2 * ["███"]
    assert (drawn[0][:9].strip(), drawn[7][:9].strip(), drawn[8].strip()) == (
        "2",
        "0",
        "step 1: 2, step 3: 0.5",
    )
    assert "0.25" not in card


def test_the_examples_in_docstrings_run() -> None:
    """What the escaping shows in its docstring is what it gives."""
    ran = doctest.testmod(cards)
    assert ran.attempted and not ran.failed


def _code(text: str, language: str) -> str:
    return "".join(
        token.content for token in parsed(text) if token.type == "fence" and token.info == language
    )


@pytest.mark.long  # where the oldest client is tested there is no torch
@pytest.mark.parametrize(
    ("architecture", "config", "method", "whole"),
    [
        ("LlamaForCausalLM", "LlamaConfig", adapterpack.LoRA(r=20, targets=("q_proj",)), False),
        (
            "BertForSequenceClassification",
            "BertConfig",
            adapterpack.DoRA(r=2, targets=("query",), modules_to_save=("classifier",)),
            True,
        ),
    ],
    ids=["a language model", "a classifier"],
)
def test_the_code_of_a_card_runs(
    architecture: str, config: str, method: Any, whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The snippet for PEFT as it stands, where ``org/base`` and ``org/tickets`` are folders: the pack's
    logits. vLLM is offered for a LoRA of a language model alone.
    """
    import torch
    import transformers
    from noise import shake

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 20,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    model = getattr(transformers, architecture)(
        getattr(transformers, config)(**sizes, num_labels=3, pad_token_id=0)
    )
    model.save_pretrained("org/base")
    adapted = shake(
        adapterpack.adapt(getattr(transformers, architecture).from_pretrained("org/base"), method, "tickets"),
        0.3,
        1,
    ).eval()
    pack = adapterpack.save(adapted, "org/tickets")
    named = replace(pack.manifest, base=replace(pack.manifest.base, name="org/base"))
    text = pack_card(dataclasses.replace(pack, manifest=named), AT, Report("pack", "here", pack.id, ()))
    made: dict[str, Any] = {}
    exec(_code(text, "python"), made)
    ids = torch.arange(5)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            made["model"].eval()(input_ids=ids).logits, adapted(input_ids=ids).logits, atol=1e-6, rtol=0
        )
    assert ("vllm serve org/base --enable-lora --max-lora-rank 32 " in _code(text, "sh")) != whole
    assert ("it leaves the lengths as the base has them" in shown(text)) == whole
