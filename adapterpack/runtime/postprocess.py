"""What a row's result is made of, one function a task: labels, words, embeddings, texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ConfigError
from ..tasks.task import SPANS
from .media.image_rows import image_positions, image_token
from .media.inputs import Picture, speech_of
from .media.processor_config import section
from .model_inputs import Arrays, pad
from .rows import RowError, among, each

if TYPE_CHECKING:
    from .session import Session

Row = Mapping[str, Any]
Names = list[str | None]
Answer = Callable[["Session", Sequence[Row], Names, Mapping[str, Any]], list[dict[str, Any]]]

ASKED = ("messages", "prompt", "text", "image", "audio", "question")
"""What a row may ask; of the first three, the first that it has."""
MEDIA: dict[str, Any] = {"image": Picture, "audio": str | Path}
"""What a row may give of each kind beside texts."""
LONGEST = 30
"""Tokens that an answer has at most."""
BEST = 5
"""How many words a masked one is guessed by."""


def _generated(session: Session, rows: Sequence[Row], names: Names, sampling: Mapping[str, Any]) -> list[dict[str, Any]]:
    if "input_features" in session.task.inputs:
        found = session.generate([], names, given={"input_features": _speech(session, rows)}, **sampling)
    elif "pixel_values" in session.task.inputs:
        seen = [number for number, row in enumerate(rows, 1) if "image" in row]
        with among(seen):
            given = _images(session, [rows[number - 1] for number in seen]) if seen else None
        found = session.generate(each(rows, partial(_seeing, session)), names, given=given, **sampling)
    else:
        found = session.generate(each(rows, _prompt), names, **sampling)
    return [{"completion": g.text, "finish_reason": g.finish_reason, "prompt_tokens": g.prompt_tokens, "completion_tokens": len(g.ids)}
            for g in found]


def _classified(session: Session, rows: Sequence[Row], names: Names, sampling: Mapping[str, Any]) -> list[dict[str, Any]]:
    logits = session.run(_read(session, rows), names)["logits"]
    return [_no_head() if labels is None else _scored(row, labels) for row, labels in zip(logits, _labels(session, names), strict=True)]


def _each_token(session: Session, rows: Sequence[Row], names: Names, sampling: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The label of every token of the text, with the place of its characters."""
    logits = session.run(_read(session, rows), names)["logits"]
    results: list[dict[str, Any]] = []
    for row, scores, labels in zip(rows, logits, _labels(session, names), strict=True):
        if labels is None:
            results.append(_no_head())
            continue
        tokens = []
        for place, (start, stop) in enumerate(session.tokenizer.places(_text(row))):
            if stop > start:  # special tokens stand for no character
                best = _scored(scores[place], labels)
                tokens.append({"text": _text(row)[start:stop], "start": start, "end": stop, "label": best["label"],
                               "score": best["scores"][best["label"]]})
        results.append({"tokens": tokens})
    return results


def _answered(session: Session, rows: Sequence[Row], names: Names, sampling: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The likeliest span of each row's context, and where its characters are; an empty one where no answer is likelier."""
    pairs = each(rows, lambda row: session.tokenizer.pair(*_question(row)))
    inputs = pad([ids for ids, _, _ in pairs], session.tokenizer.pad_id, left=False)
    if "token_type_ids" in session.inputs:
        inputs["token_type_ids"] = pad([types for _, types, _ in pairs], 0, left=False)["input_ids"]
    outputs = session.run(inputs, names)
    results: list[dict[str, Any]] = []
    for number, (row, name) in enumerate(zip(rows, names, strict=True)):
        if not (session.bundle.base_head_trained or (name is not None and session.packs[name].full())):
            results.append(_no_head("answer"))
            continue
        places = pairs[number][2]
        starts, ends = (outputs[side][number][: len(places)] for side in SPANS)
        start, end, score = best_span(starts, ends, [place is not None for place in places])
        first, last = (places[at] or (0, 0) for at in (start, end))
        results.append({"answer": _question(row)[1][first[0] : last[1]], "start": first[0], "end": last[1], "score": round(score, 6)})
    return results


def best_span(starts: np.ndarray, ends: np.ndarray, inside: Sequence[bool]) -> tuple[int, int, float]:
    """The span of at most :data:`LONGEST` tokens, all ``inside``, with the largest sum of logits, and its probability; the first token
    stands for no answer (Devlin et al. 2019, https://arxiv.org/abs/1810.04805, section 4.3).

    Example:
        >>> best_span(np.array([0.0, 1, 9, 0]), np.array([0.0, 0, 1, 9]), [False, True, True, True])[:2]
        (2, 3)
    """
    allowed = np.triu(np.ones((len(starts), len(starts)), bool)) & ~np.triu(np.ones((len(starts), len(starts)), bool), LONGEST)
    allowed &= np.outer(inside, inside)
    allowed[0, 0] = True
    chances = [_chances(np.where([True, *inside[1:]], side, -np.inf)) for side in (starts, ends)]
    spans = np.where(allowed, np.outer(*chances), -1.0)
    start, end = np.unravel_index(int(spans.argmax()), spans.shape)
    return int(start), int(end), float(spans[start, end])


def _guessed(session: Session, rows: Sequence[Row], names: Names, sampling: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The likeliest words in the place of the first mask."""
    inputs, mask = _read(session, rows), session.tokenizer.mask_id
    logits = session.run(inputs, names)["logits"]
    results = []
    for number, (row, ids, found) in enumerate(zip(rows, inputs["input_ids"], logits, strict=True), 1):
        places = np.flatnonzero(ids == mask)
        if mask is None or not len(places):
            expected = session.tokenizer.mask_token or "a tokenizer with a mask token"
            raise RowError("a row of this task needs a mask", row=number, found=_text(row)[:80], expected=expected)
        chances = _chances(found[places[0]])
        best = np.argsort(-chances, kind="stable")[:BEST]
        results.append({"words": [{"text": session.tokenizer.decode([int(i)]), "score": round(float(chances[i]), 6)} for i in best]})
    return results


def _towers(session: Session, rows: Sequence[Row], names: Names, sampling: Mapping[str, Any]) -> list[dict[str, Any]]:
    """An embedding for each row, of a text or of an image: the cosine of two of them says how well they go together."""
    results: list[dict[str, Any]] = [{}] * len(rows)
    for number, row in enumerate(rows, 1):
        if "image" in row and any(key in row for key in ASKED[:3]):
            raise RowError("a row of two towers is a text or an image", row=number, found=", ".join(map(str, row)),
                           remedy="give each a row of its own")
    for read, is_image, output in ((_images, True, "image_embeds"), (_texts, False, "text_embeds")):
        mine = [number for number, row in enumerate(rows, 1) if ("image" in row) == is_image]
        if mine:
            with among(mine):
                vectors = session.run(read(session, [rows[number - 1] for number in mine]), [names[number - 1] for number in mine])[output]
            for number, vector in zip(mine, vectors, strict=True):
                results[number - 1] = {"embedding": [float(value) for value in vector]}
    return results


def _features(session: Session, rows: Sequence[Row], names: Names, sampling: Mapping[str, Any]) -> list[dict[str, Any]]:
    inputs = _read(session, rows)
    hidden = next(iter(session.run(inputs, names).values()))
    mask = inputs.get("attention_mask", np.ones(hidden.shape[:2], np.int64))
    pooled = POOLING[session.bundle.pooling](hidden, mask)
    return [{"embedding": [float(value) for value in row]} for row in pooled]


def _mean(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    found: np.ndarray = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    return found


def _last(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    last = mask.shape[1] - 1 - np.argmax(mask[:, ::-1], axis=1)
    found: np.ndarray = hidden[np.arange(len(hidden)), last]
    return found


def _first(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    found: np.ndarray = hidden[np.arange(len(hidden)), np.argmax(mask, axis=1)]
    return found


POOLING: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {"mean": _mean, "cls": _first, "last": _last}
"""How hidden states ``[rows, positions, n]`` become one vector a row: over real positions ``[rows, positions]``."""


ANSWERS: dict[str, Answer] = {
    "text-generation": _generated, "text2text-generation": _generated, "automatic-speech-recognition": _generated,
    "image-text-to-text": _generated, "text-classification": _classified, "image-classification": _classified,
    "token-classification": _each_token, "question-answering": _answered, "fill-mask": _guessed, "zero-shot-image-classification": _towers,
    "feature-extraction": _features, "image-feature-extraction": _features,
}
"""Task -> what a row's result is made of."""


def _read(session: Session, rows: Sequence[Row]) -> Arrays:
    """What the model reads of the rows: images or texts."""
    return (_images if "pixel_values" in session.task.inputs else _texts)(session, rows)


def _images(session: Session, rows: Sequence[Row]) -> Arrays:
    return {"pixel_values": session.pixels(each(rows, partial(_given, "image")))}


def _texts(session: Session, rows: Sequence[Row]) -> Arrays:
    return session.encode(each(rows, _text))


def _speech(session: Session, rows: Sequence[Row]) -> np.ndarray:
    config, _ = section(session.folder, "feature_extractor")
    shape = session.shape("input_features")
    return np.stack(each(rows, lambda row: speech_of(Path(_given("audio", row)), shape, config)))


def _given(key: str, row: Row) -> Any:
    found = row.get(key)
    if not isinstance(found, MEDIA[key]):
        raise ConfigError(f"a row of this task needs {key}", found=", ".join(map(str, row)), expected="the path of a file")
    return found


def _seeing(session: Session, row: Row) -> list[int]:
    """The ids of a prompt, with as many image tokens as its image has positions: in the place of its one, or before everything."""
    asked, token = _prompt(row), image_token(session.config)
    ids = session.tokenizer.encode(asked) if isinstance(asked, str) else session.tokenizer.prompt(asked)
    if "image" not in row:
        if token in ids:
            raise ConfigError("a prompt has image tokens, but its row has no image", found=f"{ids.count(token)} image tokens",
                              remedy="give the row an image")
        return ids
    positions = image_positions(session)
    if ids.count(token) > 1:
        raise ConfigError("a prompt has one token for its image", found=f"{ids.count(token)} image tokens", expected="1, or none",
                          remedy="leave the others out: one stands for all positions of the image")
    at = ids.index(token) if token in ids else 0
    return [*ids[:at], *[token] * positions, *ids[at + (token in ids) :]]


def _prompt(row: Row) -> Any:
    for key in ASKED[:3]:
        if isinstance(row.get(key), str | list):
            return row[key]
    raise ConfigError("a row of this task needs prompt, text or messages", found=", ".join(map(str, row)))


def _text(row: Row) -> str:
    text = row.get("text", row.get("prompt"))
    if not isinstance(text, str):
        raise ConfigError("a row of this task needs text", found=", ".join(map(str, row)))
    return text


def _question(row: Row) -> tuple[str, str]:
    asked, context = row.get("question", row.get("prompt")), row.get("context")
    if not isinstance(asked, str) or not isinstance(context, str):
        raise ConfigError("a row of this task needs question and context", found=", ".join(map(str, row)))
    return asked, context


def _labels(session: Session, names: Names) -> list[tuple[str, ...] | None]:
    """The labels of each row's head, or None for one that nobody trained."""
    own = [name is not None and session.packs[name].manifest.task.labels for name in names]
    return [session.labels(name) if trained or session.bundle.base_head_trained else None for name, trained in zip(names, own, strict=True)]


def _no_head(what: str = "label") -> dict[str, Any]:
    return {what: None, "note": "the base has no trained head for this task"}


def _scored(logits: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    chances = _chances(logits[: len(labels)])
    return {"label": labels[int(chances.argmax())],
            "scores": {label: round(float(score), 6) for label, score in zip(labels, chances, strict=True)}}


def _chances(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    found: np.ndarray = weights / weights.sum()
    return found
