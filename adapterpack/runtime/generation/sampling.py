"""Sampling parameters: their names, defaults and bounds, as a caller or the model's
``generation_config.json`` sets them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ConfigError, FormatError, excerpt, require_among
from ...io import Config
from .logits_processors import LOGITS_PROCESSORS, MAX_ENTRIES, MAX_TOKENS, TOKEN_ID, Range, read_ids

GRAMMARS = ("json_schema", "regex", "grammar")
"""The parameters that constrain the text of an answer; a row has at most one of them."""


_RANGES = {
    "max_length": Range(int, 1, MAX_TOKENS),
    "max_new_tokens": Range(int, 1, MAX_TOKENS),
    "temperature": Range(float, 0, 1000),
    "top_k": Range(int, 0, MAX_TOKENS),
    "top_p": Range(float, 0, 1, above=True),
    "min_p": Range(float, 0, 1),
    "repetition_penalty": Range(float, 0.01, 100),
    "presence_penalty": Range(float, -2, 2),
    "frequency_penalty": Range(float, -2, 2),
    "seed": Range(int, -(1 << 63), (1 << 64) - 1),
    "logprobs": Range(int, 0, 20),
    "num_beams": Range(int, 1, 1024),
    "length_penalty": Range(float, -10, 10),
    "num_return_sequences": Range(int, 1, 1024),
}
_OPTIONAL = ("max_length", "logprobs")
"""Numbers that may be None."""
_BIAS = Range(float, -100, 100)
_AGAINST_GRAMMARS = (
    "min_new_tokens",
    "min_length",
    "ignore_eos",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "first_tokens",
)
"""Parameters that conflict with a grammar, which decides itself where an answer ends."""
_BEAM_KEYS = ("length_penalty", "early_stopping", "num_return_sequences")
"""Parameters that apply only to a beam search."""
_DRAW_KEYS = ("temperature", "top_k", "top_p", "min_p")
"""Parameters that apply only if tokens are drawn (``do_sample``)."""
_SAMPLED = {"temperature": 1.0, "top_k": 50}
"""The defaults of transformers for a ``generation_config.json`` with ``do_sample``."""


@dataclass(frozen=True)
class Sampling:
    """The sampling parameters of a row, by the names of transformers and vLLM.

    Choosing tokens: ``temperature`` 0 takes the most likely token. Otherwise one is drawn from the ``top_k``
    most likely (0: all), of these from the fewest that hold ``top_p`` of the probability, and of these from
    those at least ``min_p`` times as likely as the most likely. Ties with the last of them are kept, too.
    ``repetition_penalty`` divides the positive logits of tokens in prompt and answer, and multiplies the
    negative ones. ``presence_penalty`` is subtracted once from the logits of tokens in the answer,
    ``frequency_penalty`` as often as they occur. ``logit_bias`` (token id -> number) is added before that.

    Ending: a row ends after ``max_new_tokens``, or at ``max_length`` tokens including the prompt; at an end
    token of the model (not with ``ignore_eos``), at one of ``stop_token_ids``, or at a ``stop`` text; these
    are cut off (stop texts are not with ``include_stop_str_in_output``). No such token is chosen before
    ``min_new_tokens``.

    Output: special tokens have no text, unless ``skip_special_tokens`` is off. ``logprobs`` N returns the
    log-probability of each token and of the N most likely at its position, by the model's own distribution,
    before any of the above. ``json_schema``, ``regex`` or ``grammar`` (Lark) constrains the text of the
    answer; see :mod:`.structured`.

    Excluding and forcing tokens: ``no_repeat_ngram_size`` N lets no N tokens occur twice in prompt and
    answer, and ``bad_words_ids`` (lists of token ids) excludes these sequences. ``suppress_tokens`` are never
    chosen, ``begin_suppress_tokens`` not at the first position. ``first_tokens`` lists the tokens among
    which the first of the answer is chosen, then the second, and so on. ``forced_bos_token_id`` is the second
    token of the row, ``forced_eos_token_id`` the last for which there is room, and a row does not end below
    ``min_length`` tokens including the prompt. In an encoder-decoder the prompt is what the decoder begins
    with.

    Beam search, as in transformers: ``num_beams`` above 1 keeps so many sequences at a time and returns
    ``num_return_sequences`` of the finished ones, ordered by the sum of their log-probabilities divided by
    their length to the power of ``length_penalty``. ``early_stopping``: the search ends when as many
    sequences have finished as there are beams (True), when better ones are unlikely (False), or when none can
    follow (``"never"``). Tokens are then not drawn, and have no log-probabilities of their own.

    Raises:
        ConfigError: a parameter has a wrong type or is out of range, or parameters contradict each other.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict, hash=False)
    min_new_tokens: int = 0
    logprobs: int | None = None
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    json_schema: Mapping[str, Any] | str | None = dataclasses.field(default=None, hash=False)
    regex: str | None = None
    grammar: str | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return_sequences: int = 1
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    min_length: int = 0
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | tuple[int, ...] | None = None
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    first_tokens: tuple[tuple[int, ...], ...] = ()
    max_length: int | None = None

    def __post_init__(self) -> None:
        # iterating over a str would make each of its characters a stop text
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, Collection) or not all(isinstance(text, str) for text in stop):
            raise ConfigError("a stop text must be a string", where="stop", found=excerpt(self.stop))
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(
                    "this must be true or false", where=name, found=excerpt(getattr(self, name))
                )
        numbers = {
            name: bounds.read(name, getattr(self, name))
            for name, bounds in _RANGES.items()
            if name not in _OPTIONAL or getattr(self, name) is not None
        }
        rules = {name: rule.read(name, getattr(self, name)) for name, rule in LOGITS_PROCESSORS.items()}
        read = {
            **numbers,
            **rules,
            "stop": tuple(stop),
            "logit_bias": _bias(self.logit_bias),
            "stop_token_ids": read_ids("stop_token_ids", self.stop_token_ids),
        }
        for name, value in read.items():
            object.__setattr__(self, name, value)
        if self.min_new_tokens > self.max_new_tokens:
            raise ConfigError(
                "the least number of new tokens is above the largest",
                where="min_new_tokens",
                found=self.min_new_tokens,
                expected=f"at most max_new_tokens, {self.max_new_tokens}",
            )
        self._require_one_grammar()
        self._require_beams()

    def _require_beams(self) -> None:
        if not (isinstance(self.early_stopping, bool) or self.early_stopping == "never"):
            raise ConfigError(
                "unknown rule for the end of a beam search",
                where="early_stopping",
                found=excerpt(self.early_stopping),
                expected='True, False or "never"',
            )
        if self.num_return_sequences > self.num_beams:
            raise ConfigError(
                "a search gives as many sequences as it has beams, at most",
                where="num_return_sequences",
                expected=f"at most num_beams, {self.num_beams}",
                found=self.num_return_sequences,
            )
        if self.num_beams == 1:
            alone = [
                name
                for name in ("length_penalty", "early_stopping")
                if getattr(self, name) != getattr(Sampling, name)
            ]
            if alone:
                raise ConfigError(
                    "this parameter is one of a beam search",
                    where=alone[0],
                    found="num_beams 1",
                    remedy="leave it out, or give num_beams above 1",
                )
        elif self.temperature or self.logprobs is not None:
            raise ConfigError(
                "a beam search draws no tokens, and has no log-probabilities of single ones",
                found=f"num_beams {self.num_beams}",
                where="temperature" if self.temperature else "logprobs",
                remedy="leave it out, or give num_beams=1",
            )

    def _require_one_grammar(self) -> None:
        given = [name for name in GRAMMARS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError("an answer has one form", found=", ".join(given), remedy="give one of them")
        against = [name for name in _AGAINST_GRAMMARS if getattr(self, name) != getattr(Sampling, name)]
        if given and against:
            raise ConfigError(
                f"{given[0]} says what an answer is and where it may end",
                found=", ".join(against),
                remedy=f"leave out {given[0]}, or {' and '.join(against)}",
            )

    def room(self, prompt: int) -> int:
        """Returns how many tokens may follow a prompt of so many.

        Raises:
            ConfigError: ``max_length`` leaves no room after the prompt.
        """
        room = (
            self.max_new_tokens
            if self.max_length is None
            else min(self.max_new_tokens, self.max_length - prompt)
        )
        if room < 1:
            raise ConfigError(
                "a prompt leaves no room for an answer",
                where="max_length",
                found=f"{prompt} tokens",
                expected=f"fewer than {self.max_length}",
                remedy="give a larger max_length, or max_new_tokens in its place",
            )
        return room

    @property
    def reads_text(self) -> bool:
        """Whether generation depends on the answer's text, so that a tokenizer is needed."""
        return bool(self.stop) or any(getattr(self, name) is not None for name in GRAMMARS)

    def end_ids(self, eos: Collection[int]) -> frozenset[int]:
        """Returns the tokens at which a row ends, for a model with these end tokens."""
        return frozenset(self.stop_token_ids) | (frozenset() if self.ignore_eos else frozenset(eos))


def sampling_of(options: Mapping[str, Any], generation_config: Config, folder: Path) -> Sampling:
    """Makes the parameters of a call. Those that it leaves out are greedy defaults, or with
    ``sampling="model"`` those of the model's ``generation_config.json``, as transformers reads it.

    Raises:
        ConfigError: a parameter is unknown or invalid.
        FormatError: the file has an invalid parameter.
    """
    names = [field.name for field in dataclasses.fields(Sampling)]
    for name in options:
        require_among("unknown sampling parameter", name, [*names, "sampling"], ConfigError)
    given = {name: value for name, value in options.items() if name != "sampling"}
    rule = options.get("sampling", "greedy")
    if rule not in ("greedy", "model"):
        raise ConfigError(
            "unknown way to choose tokens",
            where="sampling",
            expected="greedy or model",
            found=excerpt(rule),
        )
    return _of_model(generation_config, folder, given) if rule == "model" else Sampling(**given)


def _of_model(config: Config, folder: Path, given: Mapping[str, Any]) -> Sampling:
    """Merges the parameters of a call into those of a ``generation_config.json``. Without ``do_sample`` the
    file's drawing parameters are ignored.
    """
    draws = config.get("do_sample") is True
    names = (
        *(_DRAW_KEYS if draws else ()),
        "repetition_penalty",
        "num_beams",
        *_BEAM_KEYS,
        *LOGITS_PROCESSORS,
    )
    said = {
        **(_SAMPLED if draws else {}),
        **{name: config[name] for name in names if config.get(name) is not None},
    }
    own, whole = config.get("max_new_tokens"), config.get("max_length")
    if "max_new_tokens" not in given and "max_length" not in given:
        if own is not None:
            said["max_new_tokens"] = own
        elif whole is not None:  # which counts the prompt too
            said |= {"max_new_tokens": whole, "max_length": whole}
    if {**said, **given}.get("num_beams", 1) == 1:
        said = {name: value for name, value in said.items() if name not in _BEAM_KEYS}
    if any(given.get(name) is not None for name in GRAMMARS):
        said = {name: value for name, value in said.items() if name not in _AGAINST_GRAMMARS}
    most = {**said, **given}.get("max_new_tokens", Sampling.max_new_tokens)
    if isinstance(said.get("min_new_tokens"), int) and isinstance(most, int):
        said["min_new_tokens"] = min(said["min_new_tokens"], most)  # a caller's smaller max_new_tokens wins
    left_out = {name: value for name, value in said.items() if name not in given}
    try:
        return Sampling(**{**left_out, **given})
    except ConfigError as error:
        if error.where not in left_out:
            raise
        raise FormatError(
            error.what,
            where=f"{folder / 'generation_config.json'}#{error.where}",
            expected=error.expected,
            found=error.found,
            remedy='give the parameter, or leave out sampling="model"',
        ) from error


def _bias(bias: Any) -> dict[int, float]:
    """Reads ``logit_bias``; keys may be strings, as JSON requires."""
    if not isinstance(bias, Mapping) or len(bias) > MAX_ENTRIES:
        raise ConfigError(
            "a bias must map ids of tokens to numbers",
            where="logit_bias",
            expected=f"token id -> number, for at most {MAX_ENTRIES} tokens",
            found=excerpt(bias),
        )
    keys = [
        int(key) if isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) < 11 else key
        for key in bias
    ]
    return {
        int(TOKEN_ID.read("logit_bias", key)): float(_BIAS.read(f"logit_bias[{key}]", value))
        for key, value in zip(keys, bias.values(), strict=True)
    }
