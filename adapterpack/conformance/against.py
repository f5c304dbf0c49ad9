"""Judges by a target's answers whether a pack acts there: as it should, not at all, too strongly or weakly,
in part, or on another base.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..errors import (
    BaseMismatch,
    ConfigError,
    FormatError,
    NothingToDo,
    ParityError,
    Unsupported,
    excerpt,
)
from ..hub import folder_of
from ..manifest import TopLogits
from ..pack import canary, load
from ..pack.validate.checks import CheckRule, Finding, Report
from ..paths import StrPath
from ..runtime import text  # whose tokenizer is imported where one is used
from .targets import Logprobs, Responder, open_server

if TYPE_CHECKING:
    from torch.nn import Module

BASE = CheckRule(
    "AC101",
    "Without the adapter the target answers as the base that the pack was made for.",
    "give the target the base that the pack names",
    error=BaseMismatch,
)
ROUNDED = CheckRule(
    "AC102",
    "The target's base is no coarser than half precision.",
    "nothing, if its weights are quantized; else give it the base that the pack names",
    "warning",
)
CHAT = CheckRule(
    "AC103",
    "The target writes a conversation as the base's chat template does.",
    "start it with the base's chat template",
    "warning",
)
NO_EFFECT = CheckRule(
    "AC201",
    "The adapter changes the target's answers.",
    "check that the target loaded it, and that the request names it",
    error=NothingToDo,
)
PARTLY = CheckRule(
    "AC202",
    "The whole adapter acts, as strongly as when it was made.",
    "check alpha, rank, rsLoRA, the scale of the request, and the names of the adapter's modules",
    error=ParityError,
)
OTHER = CheckRule(
    "AC203",
    "The adapter changes the answers as it did when it was made.",
    "check that the target loaded this pack, and that its factors are the right way round",
    error=ParityError,
)

_CONVERSATION = [
    {"role": "user", "content": "Where is my parcel?"},
    {"role": "assistant", "content": "On its way."},
    {"role": "user", "content": "Since when?"},
]
_MORE_ROWS = 6
"""Rows of random tokens beside the canary's own, where a base is given: more answers, less noise."""
_LENGTH = 12
_SHARED = 8
"""How many of the adapter's likeliest tokens the base is asked for, too."""
_EXACT = 1e-4
_HALF = 0.02
_QUANTIZED = 0.25
"""How far a base's answers may be off, relative to the largest logit: by float32, by half precision and by
four bits. Measured: 5e-5, 2e-3 and 3.5e-2; eight bits 3e-3.
"""
_OFF_EXACTLY, _OFF = 0.05, 0.1
"""How far the change may be off, relative to the adapter's effect, of a float32 target and of others.
Measured at strong adapters: 0.031 and 0.07, since what an adapter changes is rounded anew.
"""
_AMPLIFIED = 3.0
"""How many times the rounding of the base's answers the change may be off: the most measured is 2.3."""
_ENOUGH = 6
"""How many answers more than rows tell one effect from another: the mean of a row says nothing."""
_UNMOVED = 1e-6
"""Answers with and without the adapter that differ by less, relative to the largest logit, are the same."""
_TELLING = 0.5
"""Beyond this share of the effect, one effect cannot be told from another."""


_FURTHER = "as those of quantized weights are, or of a base that was trained further"


class Row(NamedTuple):
    """A row of tokens: the logits that must follow it without the pack and with it, as far as they are known,
    and the target's answers with the adapter and, where it can be asked for them, without.
    """

    base: Logprobs
    pack: Logprobs
    asked: Logprobs
    asked_base: Logprobs | None


Fault = tuple[str, Sequence[Logprobs]]
"""What is wrong, and the logits that would follow each row then."""


def validate_against(
    path: StrPath, target: StrPath | Module, base: StrPath | None = None, model: str | None = None
) -> Report:
    """Asks what runs a pack the pack's canary, and reports whether the pack acts there, and if not, what its
    answers fit.

    ``target`` is the address of adapterpack's server, vLLM or llama.cpp, a folder (a checkpoint that the pack
    was merged into, onnxruntime-genai's, or an adapter of MLX), or a model of transformers' or PEFT's in this
    process; ``model`` is the adapter's name there, by default the pack's. With the pack's ``base``, further
    rows of tokens are asked for, and the answers are compared with those of the usual faults. Only
    log-probabilities are compared: up to a constant they are logits.

    Raises:
        ConfigError: the target cannot be asked without the adapter, and no base is given.
        FormatError: its answers cannot be read.
        StorageError, UnknownAdapter, Unsupported: see :func:`.targets.open_server`.
        MissingExtra: the library of a folder is not installed.

    Example:
        >>> validate_against("packs/tickets", "http://localhost:8000").state  # doctest: +SKIP
        'valid'
    """
    pack = load(folder_of(path))
    recorded = pack.manifest.canary
    where = model or pack.name
    texts = pack.manifest.task.type in (None, "text-generation")
    if recorded is None or not texts or canary.input_names(recorded) != {"input_ids"}:
        reason = "no canary of a text is in the pack, and nothing else can be asked"
        return Report("pack", str(path), pack.id, (), (reason,), incomplete=True)
    served = isinstance(target, str) and target.startswith(("http://", "https://"))
    if base is not None or not served:
        from . import libraries, references  # noqa: PLC0415 - torch, which a server need not have beside it
    given = None if base is None else folder_of(base)
    opened = open_server(str(target), where) if served else libraries.open_target(target, where, given)
    if given is None and opened.ask_base is None:
        raise ConfigError(
            "the target cannot be asked without the adapter, so its change cannot be told",
            where=opened.name,
            remedy="give the base with --base",
        )
    kept = zip(recorded.base, recorded.adapter, strict=True)
    wanted = [list(dict.fromkeys([*without["ids"], *with_pack["ids"]])) for without, with_pack in kept]
    rows = [_ask(opened, ids, asked) for ids, asked in zip(recorded.input_ids, wanted, strict=True)]
    if not all(map(_recognizes, rows, recorded.base)):
        message = "the tokens that are likeliest without the adapter are not those of the pack's base"
        return Report("pack", str(path), pack.id, (BASE.at(opened.name, message),))
    faults: Iterable[Fault] = ()
    if given is None:
        rows = [
            row._replace(base=_logits(without), pack=_logits(with_pack))
            for row, without, with_pack in zip(rows, recorded.base, recorded.adapter, strict=True)
        ]
    else:
        rng = np.random.default_rng(canary.SEED)
        most = max(max(ids) for ids in recorded.input_ids) + 1
        more = [tuple(map(int, rng.integers(1, most, _LENGTH))) for _ in range(_MORE_ROWS)]
        rows += [_ask(opened, ids, ids[-1:]) for ids in more]
        without, with_pack, faulty = references.reference_logits(pack, given, [*recorded.input_ids, *more])
        rows = [
            row._replace(base=_shown(row, one), pack=_shown(row, two))
            for row, one, two in zip(rows, without, with_pack, strict=True)
        ]
        faults = (
            (sentence, [_shown(row, one) for row, one in zip(rows, arrays, strict=True)])
            for sentence, arrays in faulty
        )
    if not all(row.pack for row in rows):
        raise FormatError("the target's answers name no token of the base", where=opened.name)
    found = judge(rows, faults, opened.name)
    chat = () if given is None else _other_chat(opened, given)
    return Report(
        "pack",
        str(path),
        pack.id,
        (*found.findings, *chat),
        found.left_open,
        incomplete=bool(found.left_open),
        evidence=f"{opened.name}: {found.evidence}",
    )


def _ask(target: Responder, ids: Sequence[int], wanted: Sequence[int]) -> Row:
    """Asks for one row, for the tokens that are wanted and for the likeliest ones."""
    asked = target.ask(ids, wanted)
    likeliest = sorted(asked, key=asked.__getitem__, reverse=True)[:_SHARED]
    return Row(
        {}, {}, asked, None if target.ask_base is None else target.ask_base(ids, [*wanted, *likeliest])
    )


def _other_chat(target: Responder, base: Path) -> Iterator[Finding]:
    """Yields a finding if a target that shows its chat template reads a conversation as other tokens than the
    base's template writes.
    """
    if target.render is None or not (base / "tokenizer.json").is_file():
        return
    tokenizer = text.Tokenizer(base)
    if tokenizer.template is None:
        return
    try:
        theirs = target.render(_CONVERSATION)
    except (FormatError, Unsupported):  # a server without this route
        return
    bos = tokenizer.special_tokens.get("bos_token", "")  # which some servers add later
    texts = [
        tokenizer.decode(ids, skip_special_tokens=False).removeprefix(bos)
        for ids in (theirs, tokenizer.prompt(_CONVERSATION))
    ]
    if texts[0] != texts[1]:
        pairs = enumerate(zip(*texts, strict=False))
        same = next((place for place, (one, other) in pairs if one != other), min(map(len, texts)))
        theirs_on, ours_on = (excerpt(written[same:]) for written in texts)
        yield CHAT.at(target.name, f"it writes {theirs_on} where the base's chat template writes {ours_on}")


def _recognizes(row: Row, recorded: TopLogits) -> bool:
    """Whether a third of a base's likeliest tokens are among twice as many of the target's."""
    if row.asked_base is None:
        return True
    tokens = recorded["ids"]
    likeliest = sorted(row.asked_base, key=row.asked_base.__getitem__, reverse=True)[: 2 * len(tokens)]
    return 3 * len({*tokens} & {*likeliest}) >= len(tokens)


def _logits(recorded: TopLogits) -> Logprobs:
    return dict(zip(recorded["ids"], map(float, recorded["logits"]), strict=True))


def _shown(row: Row, logits: np.ndarray) -> Logprobs:
    """Returns the logits of the tokens that the target showed of a row."""
    return {
        token: float(logits[token]) for token in {*row.asked, *(row.asked_base or ())} if token < len(logits)
    }


class Conclusion(NamedTuple):
    """What is wrong with a target's answers, what they leave open, and in numbers how near they came."""

    findings: tuple[Finding, ...]
    left_open: tuple[str, ...]
    evidence: str


def judge(rows: Sequence[Row], faults: Iterable[Fault], where: str) -> Conclusion:
    """Compares a target's answers with the logits that base and pack must give.

    Answers and logits differ by a constant a row, so both are centred over the tokens that are known of both.
    The effect is the change from base to pack; how far the base's answers are off is what the target rounds.
    """
    size = max(abs(value) for row in rows for value in (*row.base.values(), *row.pack.values()))
    errors = [_difference(row.asked_base, row.base) for row in rows if row.asked_base is not None]
    rounds = _rms(*errors) if errors else 0.0
    off = f"its answers without the adapter are {_percent(rounds / size)} of the largest logit off"
    if rounds > _QUANTIZED * size:
        return Conclusion((BASE.at(where, off),), (), off)
    findings = (ROUNDED.at(where, f"{off}, {_FURTHER}"),) if rounds > _HALF * size else ()
    exact = bool(errors) and rounds < _EXACT * size
    shown, effect = _changes(rows, [row.pack for row in rows], exact)
    strength = _rms(effect)
    least = _rms(shown - effect)
    told = max((_OFF_EXACTLY if exact else _OFF) * strength, _AMPLIFIED * rounds)
    moved = _rms(_changes(rows, [row.pack for row in rows], True)[0]) if errors else _rms(shown)
    base = off if errors else "it was asked with the adapter only"
    seen = _OFF_EXACTLY * strength if effect.any() else 0.0
    if moved <= (max(seen, _UNMOVED * size) if errors else told):
        return Conclusion((*findings, NO_EFFECT.at(where, "the adapter has no effect")), (), base)
    if len(shown) - len(rows) < _ENOUGH:
        doubt = (
            "whether the adapter acts as it should: too few logits are recorded both with it and without, "
        )
        return Conclusion(findings, (doubt + "for a target that rounds; give the base (--base)",), base)
    short = f"its change is {_percent(least / strength)} of the adapter's effect off"
    evidence = f"{base}, and {short}, at {len(shown)} tokens"
    if least <= min(told, _TELLING * strength):
        return Conclusion(findings, (), evidence)
    if least <= told:
        doubt = f"whether the adapter acts as it should: {short}, which rounding may explain"
        return Conclusion(findings, (doubt,), evidence)
    times = float(shown @ effect / (effect @ effect))
    guesses = [(_rms(shown - times * effect), f"{times:.2g} times as strong")]
    guesses += [(_rms(shown - _changes(rows, one, exact)[1]), sentence) for sentence, one in faults]
    nearest, sentence = min(guesses)
    if nearest <= min(told, least / 2, _TELLING * _rms(shown)):
        wrong = PARTLY.at(where, f"the adapter acts, but {sentence}")
    else:
        wrong = OTHER.at(where, f"the adapter acts, but not as this pack does: {short}")
    return Conclusion((*findings, wrong), (), evidence)


def _changes(rows: Sequence[Row], changed: Sequence[Logprobs], exact: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns how the target's answers change from base to adapter, and how logits change from base to
    ``changed``, at the tokens that are known of all. The answers of an ``exact`` target's base stand for
    logits that are not known.
    """
    answers, logits = [], []
    for row, after in zip(rows, changed, strict=True):
        # rounding that base and adapter share cancels if both sides are the target's
        before = row.base if row.asked_base is None else row.asked_base
        tokens = [token for token in row.asked if token in before and token in after]
        known = row.base if all(token in row.base for token in tokens) else before
        if not exact:
            known = row.base
            tokens = [token for token in tokens if token in known]
        answers.append(_centred([row.asked[token] - before[token] for token in tokens]))
        logits.append(_centred([after[token] - known[token] for token in tokens]))
    return np.concatenate(answers), np.concatenate(logits)


def _difference(answers: Logprobs, logits: Logprobs) -> np.ndarray:
    return _centred([answers[token] - logits[token] for token in answers if token in logits])


def _centred(values: Sequence[float]) -> np.ndarray:
    array = np.array(values, np.float64)
    return array - array.mean() if array.size else array


def _percent(share: float) -> str:
    return "less than 0.1%" if share < 1e-3 else f"{share:.1%}"


def _rms(*parts: np.ndarray) -> float:
    joined = np.concatenate(parts)
    return float(np.sqrt(np.mean(joined**2))) if joined.size else float("inf")
