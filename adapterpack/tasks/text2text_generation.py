"""Text to text with an encoder-decoder model: translations, summaries."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError
from .conversations.form import read_form, text_of
from .data import Encoded, Labels, Row, prompt_of, report_of
from .targets import target_ids
from .task import MAIN, TASKS, TEXT, Part, Task, TaskTraining
from .text_generation import answer


def encode(
    rows: Any, tokenizer: Any, max_length: int, where: object, labels: Labels | None = None
) -> list[Encoded]:
    """Returns token ids of the source text and of the last answer with its end token; the rows have a format
    for language models.

    Both are cut at ``max_length``. The log says how many rows are cut, and which columns are not read.

    Raises:
        ConfigError: a row does not have the format that its columns indicate, or has no source text.
    """
    report = report_of(where)
    form = read_form(rows, report)

    def encode_row(row: Row, place: object) -> Encoded:
        with form.errors(place):
            *before, last = form.read(row).messages
            source = "\n".join(text_of(message["content"]) for message in before)
        if not source:
            raise ConfigError("a row has nothing to read before its answer", where=place)
        ids = tokenizer(source)["input_ids"]
        wanted = target_ids(tokenizer, last["content"], max_length + 1, place)
        report.cut += max(len(ids), len(wanted)) > max_length
        return {"input_ids": ids[:max_length], "labels": wanted[:max_length]}

    encoded = report.encode(rows, encode_row)
    report.warn_of_cuts(rows, max_length)
    return encoded


TASKS.register(
    Task(
        "text2text-generation",
        "AutoModelForSeq2SeqLM",
        answer,
        ("ForConditionalGeneration", "MTModel"),
        lambda config: bool(config.get("is_encoder_decoder")) and "vision_config" not in config,
        parts=(
            Part("encoder", "encoder", TEXT),
            Part(
                MAIN, "cross_decoder", ("decoder_input_ids", "attention_mask", "past_key_values", "encoder")
            ),
        ),
        prompt=prompt_of,
        training=TaskTraining(encode),
        peft_type="SEQ_2_SEQ_LM",
        aliases=("translation", "summarization"),
    )
)
