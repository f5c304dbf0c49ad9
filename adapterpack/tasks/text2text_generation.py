"""Text to text by an encoder and a decoder: translations, summaries."""

from __future__ import annotations

from .rows import prompt_of
from .task import MAIN, TASKS, TEXT, Part, Task
from .text_generation import answer

TASKS.register(Task(
    "text2text-generation", "AutoModelForSeq2SeqLM", answer, ("ForConditionalGeneration", "MTModel"),
    lambda config: bool(config.get("is_encoder_decoder")),
    parts=(Part("encoder", "encoder", TEXT),
           Part(MAIN, "cross_decoder", ("decoder_input_ids", "attention_mask", "past_key_values", "encoder"))),
    prompt=prompt_of, peft_type="SEQ_2_SEQ_LM", aliases=("translation", "summarization"),
))
