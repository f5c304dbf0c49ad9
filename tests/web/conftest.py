"""Tiny random models with tokenizers that browsers have, their sites, and one Chromium."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from chromium import EVIL, Page, chromium
from encoder_packs import packed
from sites import fetched

LABELS = {"alpha": ["x", EVIL, "z"], "beta": list("pqrst"), "gamma": ["one", "two"]}
SPLIT = 100_000
"""Bytes of a data file: the tiny models have several."""


@pytest.fixture(scope="session")
def tiny_of(minilm: Path, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``bert`` or ``llama`` -> a folder with a random base, and the packs alpha, beta and gamma next to
    it.
    """
    import shutil

    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, set_seed

    @cache
    def make(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(f"web-{kind}")
        set_seed(3)
        if kind == "bert":
            BertModel(
                BertConfig(
                    vocab_size=30_522,
                    hidden_size=24,
                    num_hidden_layers=2,
                    num_attention_heads=3,
                    intermediate_size=40,
                    max_position_embeddings=64,
                    hidden_dropout_prob=0.0,
                    attention_probs_dropout_prob=0.0,
                )
            ).save_pretrained(folder / "base")
        else:
            LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=49_152,
                    hidden_size=64,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    num_key_value_heads=1,
                    intermediate_size=96,
                    max_position_embeddings=256,
                    tie_word_embeddings=True,
                    eos_token_id=2,
                )
            ).save_pretrained(folder / "base")
        for path in (minilm if kind == "bert" else smollm2).iterdir():
            if path.name in {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}:
                shutil.copyfile(path, folder / "base" / path.name)
        task = {"bert": "text-classification", "llama": "text-generation"}[kind]
        for rank, (name, labels) in enumerate(LABELS.items(), 2):
            packed(folder / "base", folder, task, name, labels if kind == "bert" else None, r=rank, alpha=3.5)
        return folder

    return make


@pytest.fixture(scope="session")
def site_of(tiny_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Kind and scheme -> a site with alpha and beta and room for a third, made by the command and complete
    with its packages.
    """
    from adapterpack import export

    @cache
    def make(kind: str, quantize: str | None = None) -> Path:
        tiny, site = tiny_of(kind), tmp_path_factory.mktemp("sites") / f"{kind}-{quantize}"
        export(
            tiny / "base",
            [tiny / "alpha", tiny / "beta"],
            site,
            target="web",
            split=SPLIT,
            slots=4,
            max_rank=5,
            quantize=quantize,
        )
        (site / "node_modules").symlink_to(fetched())
        (site / "packs").symlink_to(tiny)
        return site

    return make


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    """A browser's page."""
    with chromium(tmp_path) as opened:
        opened.call("Network.setCacheDisabled", cacheDisabled=True)  # tests alter files under their names
        yield opened
