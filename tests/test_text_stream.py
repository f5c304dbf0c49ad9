"""Streamed text: what is given out is never taken back, and put together it is the answer's text, whatever
the tokenizer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from adapterpack import Session
from adapterpack.bundle.manifest import read_bundle
from adapterpack.errors import ConfigError

Make = Callable[..., Any]
TEXT = "st é€😀"
"""Characters of one, two, three and four bytes: drawn at random, their bytes are broken in every way."""


def byte_level() -> Tokenizer:
    """One token for each byte, those of ``TEXT`` first."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    signs = dict.fromkeys([*level.pre_tokenize_str(TEXT)[0][0], *sorted(level.alphabet())])
    core = Tokenizer(models.BPE({sign: number for number, sign in enumerate(signs)}, []))
    core.pre_tokenizer, core.decoder = level, decoders.ByteLevel()
    return core


def byte_fallback() -> Tokenizer:
    """Words that begin with a sign for the space, and one token for each byte of all else, as in
    SentencePiece's files.
    """
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "▁b", "stop", "s", "t"]
    core = Tokenizer(
        models.BPE(
            {word: number for number, word in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>"
        )
    )
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return core


def word_pieces() -> Tokenizer:
    """Words and their ends."""
    words = ["[UNK]", "a", "##b", "##c", "stop", ".", "'", "s", "##s", "top"]
    core = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    core.decoder = decoders.WordPiece()
    return core


CORES: dict[str, tuple[Callable[[], Tokenizer], list[int]]] = {
    "byte level": (byte_level, list(range(16))),
    "byte fallback": (byte_fallback, [*(1 + byte for byte in TEXT.encode()), *range(257, 263)]),
    "word pieces": (word_pieces, list(range(10))),
}


def folder_of(core: Tokenizer, folder: Path, source: Path | None = None) -> Path:
    """A folder with that tokenizer, of which one token is special; or a copy of a bundle with it."""
    if source is None:
        folder.mkdir()
    else:
        shutil.copytree(source, folder)
    core.add_special_tokens([AddedToken("<end>", special=True)])
    core.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("kind", CORES)
def test_pieces_are_final_and_make_up_the_whole(kind: str, tmp_path: Path) -> None:
    """Any ids, special and unknown ones among them: no piece is taken back, and all of them are the text of
    all ids.
    """
    from adapterpack.runtime.text.detokenizer import Detokenizer
    from adapterpack.runtime.text.tokenizer import Tokenizer as Ours

    make, some = CORES[kind]
    tokenizer = Ours(folder_of(make(), tmp_path / "model"))
    end, rng = tokenizer.core.token_to_id("<end>"), np.random.default_rng(4)
    for _ in range(200):
        ids = [int(rng.choice([*some, end, 10_000])) for _ in range(int(rng.integers(1, 24)))]
        stream, given = Detokenizer(tokenizer, ()), [""]
        for token in ids:
            stream.push(token)
            given.append(stream.text)
        stream.finish()
        given.append(stream.text)
        assert all(later.startswith(earlier) for earlier, later in pairwise(given))
        # which reads a run of bytes anew with every further one, and gives up all of it if one is wrong
        if kind != "byte fallback":
            assert given[-1] == tokenizer.decode(ids)


def test_whole_characters_of_byte_fallback(tmp_path: Path) -> None:
    """Characters of many tokens come whole, and a text is what the tokenizer says of it at once; a broken one
    is replaced, not lost.
    """
    from adapterpack.runtime.text.detokenizer import Detokenizer
    from adapterpack.runtime.text.tokenizer import Tokenizer as Ours

    tokenizer = Ours(folder_of(byte_fallback(), tmp_path / "model"))
    ids = [1 + byte for byte in "€😀".encode()]
    stream, given = Detokenizer(tokenizer, ()), []
    for token in [258, *ids, 259, 257, 258]:
        stream.push(token)
        given.append(stream.text)
    assert given == ["a", "a", "a", "a€", "a€", "a€", "a€", "a€😀", "a€😀 b", "a€😀 b ", "a€😀 b  a"]
    assert given[-1] == tokenizer.decode([258, *ids, 259, 257, 258])
    broken, given = Detokenizer(tokenizer, ()), []
    for token in [1 + ord("A"), 1 + 0xE2, 259]:  # a run of bytes whose second one no character has
        broken.push(token)
        given.append(broken.text)
    broken.finish()
    assert given[:2] == ["A", "A"]
    assert broken.text.startswith("A�")
    assert broken.text.endswith("b")


@pytest.mark.parametrize(
    "stop", [("st t",), ("st", "sts"), ("tst", "ss t", " t"), ("stst", ""), ("st" * 20,)]
)
def test_a_stop_text_never_begins_to_come(stop: tuple[str, ...], tmp_path: Path) -> None:
    """What was given out before a stop text ends in no beginning of it that the text goes on with; without
    one nothing is lost.
    """
    from adapterpack.runtime.text.detokenizer import Detokenizer
    from adapterpack.runtime.text.tokenizer import Tokenizer as Ours

    tokenizer, rng, ended = Ours(folder_of(byte_level(), tmp_path / "model")), np.random.default_rng(5), 0
    letters = [tokenizer.encode(letter)[0] for letter in "st "]
    for _ in range(100):
        ids = [int(rng.choice(letters, p=[0.4, 0.4, 0.2])) for _ in range(30)]
        stream, given, pushed = Detokenizer(tokenizer, stop), [], 0
        while pushed < len(ids) and stream.stop is None:
            stream.push(ids[pushed])
            given.append(stream.text)
            pushed += 1
        stream.finish()
        whole = tokenizer.decode(ids[:pushed])
        places = [at for at in map(whole.find, filter(None, stop)) if at >= 0]
        assert (stream.stop is not None) == bool(places)
        assert stream.text == (whole[: min(places)] if places else whole)
        assert all(stream.text.startswith(earlier) for earlier in given)
        ended += stream.stop is not None
    assert ended > 20 or stop == ("st" * 20,)


def test_a_session_streams_final_text(bundle_of: Make, tmp_path: Path) -> None:
    """Through generation: every text so far begins the answer, the last one is the answer, also of rows that
    their end token or a stop text ends while something is kept back.
    """
    folder = folder_of(byte_level(), tmp_path / "bundle", bundle_of("llama", "bank"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(20, 30))}))
    read_bundle(folder).write(folder)
    session, kept, whole = Session(folder, "cpu"), 0, 0
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 3.0}
    for seed in range(12):
        prompts, names = [[5, 6, 7]] * 4, ["alpha", None, "beta", "alpha"]
        texts = [answer.text for answer in session.generate(prompts, names, **options, seed=seed)]
        stop = tuple(text[3:5] for text in texts[:2])  # of two tokens: the first one alone must not be seen
        seen: dict[int, list[tuple[int, str]]] = {row: [] for row in range(4)}

        def note(row: int, token: int, text: str, seen: dict[int, list[tuple[int, str]]] = seen) -> None:
            seen[row].append((token, text))

        found = session.generate(prompts, names, **options, seed=seed, stop=stop, emit=note)
        for row, answer in enumerate(found):
            texts = ["", *(text for _, text in seen[row])]
            assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
            assert texts[-1] == answer.text
            tokens = [token for token, _ in seen[row]]
            assert tokens[: len(answer.ids)] == list(answer.ids)
            assert len(tokens) <= len(answer.ids) + 1
            kept += len(tokens) > len(answer.ids)
            whole += answer.text == session.tokenizer.decode(answer.ids)
            assert answer.finish_reason == "stop" or answer.text == session.tokenizer.decode(answer.ids)
    assert kept, "no row had text kept back until its end token"
    assert 10 < whole < 48, "rows with and without a stop text"


def test_stop_texts_are_texts(bundle_of: Make) -> None:
    """What is no text stops nothing, and is refused."""
    with pytest.raises(ConfigError, match="stop"):
        Session(bundle_of("llama", "bank"), "cpu").generate([[5]], stop=["a", 5])
