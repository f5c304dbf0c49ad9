"""A tiny random BERT of two types of tokens, with a tokenizer that makes pairs as BERT's does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, set_seed

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def typed_bert(folder: Path, words: Sequence[str]) -> Path:
    """The base in ``folder``, whose tokenizer knows ``words``."""
    set_seed(3)
    every = [*SPECIAL, *words]
    BertModel(
        BertConfig(
            vocab_size=len(every),
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            max_position_embeddings=64,
            initializer_range=0.1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    ).save_pretrained(folder)
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(every)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)
    return folder
