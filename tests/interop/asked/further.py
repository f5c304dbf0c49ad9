"""Chat templates, vLLM's further fields, and routes that a server of texts may lack."""

from __future__ import annotations

import io
import itertools
import struct
import wave
import zlib
from base64 import b64encode
from typing import Any

from .case import (
    CLIENT,
    MODEL,
    PROMPT,
    SAID,
    TOKENS,
    case,
    chatted,
    chunks,
    completed,
    ids,
    post,
    refused,
    text,
    text_of,
    unread,
)

TEMPLATES, FIELDS, ROUTES = "Chat templates", "Further fields of vLLM", "What a model of texts need not do"
DRAWN: dict[str, Any] = {"seed": 4, "temperature": 1.3, "max_tokens": 5, "logprobs": 0}


def _prompted(**extra: Any) -> str:
    """The prompt that a chat was made into."""
    return text_of(chatted(extra_body={"return_token_ids": True, **extra}).prompt_token_ids)


@case(TEMPLATES)
def reasoning_effort() -> bool:
    """`reasoning_effort` goes to the template; one that does not read it is a note."""
    noted, plain = chatted(reasoning_effort="low"), chatted()
    return noted.choices == plain.choices and "reasoning_effort" in str(noted.adapterpack["warnings"])


@case(TEMPLATES)
def template_values() -> bool:
    """`chat_template_kwargs` go to the template."""
    without = _prompted(chat_template_kwargs={"enable_thinking": False})
    return "<think>\n\n</think>" in without and "<think>" not in _prompted()


@case(TEMPLATES)
def going_on() -> bool:
    """`continue_final_message` goes on with the last message."""
    begun = [*SAID, {"role": "assistant", "content": "Two mugs"}]
    given = {"continue_final_message": True, "return_token_ids": True}
    answer = chatted(messages=begun, extra_body=given)
    prompt = answer.prompt_token_ids
    return text_of(prompt).endswith("Two mugs") and answer.choices[0].message.content == text(prompt=prompt)


@case(FIELDS)
def best_of() -> bool:
    """`best_of` gives the likeliest of so many."""
    every = completed(n=4, **DRAWN).choices
    likeliest = max(every, key=lambda choice: sum(choice.logprobs.token_logprobs) / 5)
    return text(best_of=4, **DRAWN) == likeliest.text


@case(FIELDS)
def stop_text_kept() -> bool:
    """`include_stop_str_in_output` keeps the text that ends an answer."""
    whole = text()
    cut = text(stop=[whole[4:7]], extra_body={"include_stop_str_in_output": True})
    return cut == whole[: whole.index(whole[4:7]) + 3]


@case(FIELDS)
def usage_all_the_time() -> bool:
    """`continuous_usage_stats` counts in every chunk."""
    given = {"include_usage": True, "continuous_usage_stats": True}
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    counts = [
        chunk["usage"]["completion_tokens"]
        for chunk in chunks("/v1/completions", **body, stream_options=given)
    ]
    return counts == sorted(counts) and counts[0] < counts[-1] == TOKENS


@case(FIELDS)
def told_ids() -> bool:
    """`return_token_ids` tells the tokens of prompt and answer."""
    choice = completed(extra_body={"return_token_ids": True}).choices[0]
    return choice.prompt_token_ids == ids(PROMPT) and text_of(choice.token_ids) == choice.text


@case(FIELDS)
def salted() -> bool:
    """`cache_salt` keeps apart what was read of prompts."""
    new = unread()

    def known(salt: str) -> int:
        usage = completed(prompt=new, max_tokens=1, extra_body={"cache_salt": salt}).usage
        return int(usage.prompt_tokens_details.cached_tokens)

    return known("one") == known("two") == 0 < known("one")


@case(FIELDS)
def beams() -> bool:
    """`use_beam_search` gives the likeliest answers, the best first."""
    given = {"use_beam_search": True, "return_token_ids": True, "ignore_eos": True}
    found = [choice.token_ids for choice in completed(n=4, extra_body=given).choices]
    greedy = completed(extra_body={"return_token_ids": True, "ignore_eos": True}).choices[0].token_ids
    prompt = ids(PROMPT)

    def score(tokens: list[int]) -> float:
        scores = completed(prompt=prompt + tokens, echo=True, logprobs=0, max_tokens=0).choices[0].logprobs
        return float(sum(scores.token_logprobs[len(prompt) :]))

    scores = [score(tokens) for tokens in found]
    ordered = all(one > other - 1e-4 for one, other in itertools.pairwise(scores))
    return ordered and scores[0] > score(greedy) - 1e-4 and len({tuple(tokens) for tokens in found}) == 4


@case(ROUTES)
def suffix() -> bool:
    """`suffix`: what comes after the answer.

    an answer goes on from the end of its prompt
    """
    return bool(completed(suffix=" and a plate.").choices[0].text)


@case(ROUTES)
def embeddings() -> bool:
    """`/v1/embeddings` of a decoder.

    bundles of encoders have it
    """
    return bool(CLIENT.embeddings.create(model=MODEL, input="Where is my parcel?").data[0].embedding)


@case(ROUTES)
def reranked() -> bool:
    """`/v1/rerank` by a decoder.

    bundles of encoders have it
    """
    answer = post("/v1/rerank", model=MODEL, query="parcel", documents=["lost", "late"])
    return len(answer.raise_for_status().json()["results"]) == 2


@case(ROUTES)
def transcribed() -> bool:
    """`/v1/audio/transcriptions`.

    bundles that hear and write have it
    """
    with io.BytesIO() as sound:
        with wave.open(sound, "wb") as file:
            file.setparams((1, 2, 16_000, 0, "NONE", ""))
            file.writeframes(bytes(3_200))
        recording = ("a.wav", sound.getvalue())
    return CLIENT.audio.transcriptions.create(model=MODEL, file=recording).text is not None


@case(ROUTES)
def image() -> bool:
    """An image for a model of texts is 400, and not left out."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = part(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)) + part(
        b"IDAT", zlib.compress(bytes(4))
    )
    data = b64encode(b"\x89PNG\r\n\x1a\n" + pixels + part(b"IEND", b"")).decode()
    shown = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    return refused(400, lambda: chatted(messages=[{"role": "user", "content": [shown]}]), param="messages")
