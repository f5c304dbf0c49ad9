"""Compares the engine's graph with the ordinary one on the same rows, adapters and tokens, with prompts in
pieces and single steps.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ..base import CONFIG, read_json
from ..bundle import DECODER, GRAPH, PROOFS, Bundle, graph_file
from ..graph_passes import write_decoder
from ..io import Json, Say
from ..onnx_graph import is_fast, make_fast, try_opening
from ..pack import Pack
from ..readable import StepCounter
from ..runtime import Session, context_length, context_of, start_ids
from ..runtime.engine import AdapterReader, ModelRunner, ResidentAdapter, SequenceState
from ..runtime.media import FEATURES, OFFSETS
from ..runtime.ort import array_of
from ..runtime.sessions.decoder import DecoderOnly, EncoderDecoder
from ..runtime.sessions.generate import virtual_tokens
from ..runtime.text import text_part
from ..slots import DEFAULT
from ..slots.precision import precision
from ..tasks import MAIN, Arrays
from .compare import in_pieces, largest_difference, reads_whole, require_close, takes_much
from .int8_cache import quantize_cache

_LENGTHS = (11, 4, 7)
_STEPS = 20
_FEW_STEPS = 4
"""Steps of a large graph, of which a copy of a few layers took all."""
_PIECE = 3
"""Tokens of a prompt in one pass, so that longer prompts continue from their caches."""
_PIECES = 16
"""Number of pieces of the longest of the long prompts."""
_LONGEST = 1 << 14
_MOST_ROWS = 16
"""Limits on the rows that a manifest may request: their length and their number."""
_ROOM = 32
"""Positions reserved for the prompts of adapters."""
_IDS = 64
"""Number of ids to draw row tokens from, if the model has as many."""


def with_decoder(bundle: Bundle, folder: Path, say: Say, adapters: Sequence[Pack] = ()) -> Bundle:
    """Writes the engine's graph into the folder of an unpublished bundle, proves it on short rows and on the
    long rows that proved the ordinary graph, and returns the bundle with the report on it. Quantized products
    are computed exactly in the proof, since rounded activations would differ by more than float noise.
    ``adapters`` are loaded for the proof, besides those that the bundle holds.

    Raises:
        Unsupported: an attention of the graph has an unknown form.
        ParityError: the two graphs disagree.
    """
    made = dataclasses.replace(bundle, decoder=True)
    made.write(folder, draft=True)
    ordinary = folder / graph_file(MAIN)
    fast = is_fast(folder / graph_file(MAIN))
    if fast:
        make_fast(ordinary, fast=False)
    write_decoder(folder, context_length(read_json(folder / CONFIG), folder / CONFIG))
    report = _proof(made, folder, say, adapters)
    for path in (ordinary, folder / graph_file(DECODER)) if fast else ():
        make_fast(path)
    return dataclasses.replace(made, parity={**bundle.parity, "decoder": report})


def with_report(bundle: Bundle, **entries: object) -> Bundle:
    """Returns the bundle with these entries added to its report on the engine's graph."""
    report = {**bundle.parity.get("decoder", {}), **entries}
    return dataclasses.replace(bundle, parity={**bundle.parity, "decoder": report})


def _proof(made: Bundle, folder: Path, say: Say, adapters: Sequence[Pack]) -> Json:
    """Runs the ordinary graph first and then the engine's, so that only one has its weights in memory."""
    session = _open(dataclasses.replace(made, decoder=False), folder, adapters)
    rng = np.random.default_rng(11)
    most = _most_ids(session)
    rows = [_ids(session, rng, most, length) for length in _LENGTHS]
    start = [*start_ids(session), *_ids(session, rng, most, _PIECE)] if session.task.has_encoder else []
    # The ordinary graph of a decoder with an encoder takes prompts of one length only.
    prompts, sources = ([start] * len(rows), _sources(session, rows, rng)) if start else (rows, None)
    depth = made.parity.get("proof", {}).get("depth", PROOFS[0])
    count = _STEPS if depth == PROOFS[0] and "decoder" not in made.parity else _FEW_STEPS
    tokens = rng.integers(1, most, (count, len(rows)))
    if OFFSETS in session.inputs:  # as if the rows had images
        sources = [{OFFSETS: rng.integers(-9, 9, (1, length + 1, 3))} for length in _LENGTHS]
    elif FEATURES in session.inputs:  # an image of which nothing is seen but where its tokens are
        rows[0][2:8] = [session.image_token] * 6
        sources = [{FEATURES: np.zeros((1, 0, session.inputs[FEATURES].shape[2]), np.float32)}, {}, {}]
    choices = _names(session)
    tick = StepCounter(2 * len(choices) * (1 + count), say, "prove the engine's graph").tick
    grown = [_ordinary(session, prompts, sources, names, tokens, tick) for names in choices]
    long = _long_prompts(session, rng, most, count)
    more = rng.integers(1, most, (count, len(long)))
    alone = [
        _alone(session, ids, name, more[:, row])
        for row, (ids, name) in enumerate(zip(long, _long_names(session, long), strict=True))
    ]
    del session
    gc.collect()  # a session is a cycle
    session = _open(made, folder, adapters)
    reader = AdapterReader(session)
    batch = ModelRunner(session, reader, len(rows), max(_LENGTHS) + count + _ROOM)
    worst = 0.0
    for names, expected in zip(choices, grown, strict=True):
        placed = _by_engine(batch, prompts, sources, _read(session, reader, names), tokens, _PIECE, tick)
        worst = max(worst, _require_agreement(session, folder, expected, placed, "on short rows"))
    if long:
        worst = max(worst, _prove_long(session, folder, reader, long, more, np.stack(alone, axis=1)))
    say(f"the engine's graph agrees with the ordinary one: {worst:.1g} of the largest output")
    return {"max_relative": worst, "steps": count}


def _open(bundle: Bundle, folder: Path, adapters: Sequence[Pack]) -> Session:
    """Writes the manifest of a bundle, and opens it with ``adapters`` besides its own."""
    bundle.write(folder, draft=True)
    session = Session(folder, provider="cpu", verify="off", mapped=True)
    for pack in adapters:
        session.load(pack, allow_structural=True)
    return session


def _read(
    session: Session, reader: AdapterReader, names: Sequence[str | None]
) -> list[ResidentAdapter | None]:
    """Returns the adapter of each row; a row of the base, or of a folded bundle, has none."""
    packs = session.packs if session.bundle.mode != "folded" else {}
    return [reader.read(packs[name]) if name is not None and name in packs else None for name in names]


def _most_ids(session: Session) -> int:
    vocabulary = text_part(session.config, "vocab_size").get("vocab_size")
    return min(_IDS, vocabulary) if isinstance(vocabulary, int) else _IDS


def _ids(session: Session, rng: np.random.Generator, most: int, length: int) -> list[int]:
    """Draws random tokens, none of which is an image placeholder."""
    image = session.image_token if "image_features" in session.task.main.inputs else None
    return [int(token) if token != image else 1 + (image == 1) for token in rng.integers(1, most, length)]


def _require_agreement(
    session: Session, folder: Path, ordinary: np.ndarray, engine: np.ndarray, where: str, long: bool = False
) -> float:
    """Returns the largest difference as a share of the largest output.

    Raises:
        ParityError: the share exceeds the tolerance for the graph's dtype.
    """
    return require_close(
        f"the graph for the engine disagrees with the ordinary one {where}",
        largest_difference(engine, ordinary, session.bundle.dtype if long else DEFAULT),
        float(np.abs(ordinary).max()),
        precision(session.bundle.dtype).tolerance,
        f"{folder.name}/{graph_file(DECODER)}",
        "export with --no-static-cache, and report this model",
    )


def _long_prompts(session: Session, rng: np.random.Generator, most: int, steps: int) -> list[list[int]]:
    """Returns rows whose ``steps`` cross the lengths at which the ordinary graph was proved, as far as the
    context allows.
    """
    report = session.bundle.parity.get("long_rows")
    proved = report.get("rows") if isinstance(report, dict) and not session.task.has_encoder else None
    lengths = [length for length in proved if type(length) is int] if isinstance(proved, list) else []
    room = max((virtual_tokens(session, pack) for pack in session.packs.values()), default=0) + steps
    context = context_of(session)
    longest = _LONGEST if context is None else min(_LONGEST, context - room)
    ends = sorted({min(length - steps // 2, longest) for length in lengths})[-_MOST_ROWS:]
    return [_ids(session, rng, most, length) for length in ends if length > max(_LENGTHS)]


def _long_names(session: Session, prompts: Sequence[Sequence[int]]) -> list[str | None]:
    """Returns the adapter of each long row."""
    choices = [session.default, *session.adapters] if session.bundle.mode != "folded" else [session.default]
    return [choices[row % len(choices)] for row in range(len(prompts))]


def _prove_long(
    session: Session,
    folder: Path,
    reader: AdapterReader,
    prompts: list[list[int]],
    tokens: np.ndarray,
    alone: np.ndarray,
) -> float:
    """Compares rows that the engine runs as one batch with the ordinary graph, which ran each row ``alone``,
    in pieces.
    """
    adapters = _read(session, reader, _long_names(session, prompts))
    batch = ModelRunner(session, reader, len(prompts), max(map(len, prompts)) + len(tokens) + _ROOM)
    piece = max(_PIECE, max(map(len, prompts)) // _PIECES)
    return _require_agreement(
        session,
        folder,
        alone,
        _by_engine(batch, prompts, None, adapters, tokens, piece),
        f"on rows of {', '.join(str(len(ids)) for ids in prompts)} tokens",
        True,
    )


def _alone(session: Session, ids: Sequence[int], name: str | None, tokens: np.ndarray) -> np.ndarray:
    """Returns the ordinary graph's logits after a row's prompt and after each step ``[1 + steps,
    vocabulary]``.
    """
    if reads_whole(session) or not takes_much(session, 1, len(ids)):
        return _ordinary(session, [ids], None, [name], tokens[:, None])[:, 0]
    whole = np.array([[*ids, *tokens]], np.int64)
    logits = [outputs["logits"][0, -1] for outputs in in_pieces(session, whole, name, len(tokens))]
    return np.stack(logits[-len(tokens) - 1 :]).astype(np.float32)


def _names(session: Session) -> list[list[str | None]]:
    """Returns the adapters for each run: the base and every adapter in one batch if rows can choose, else
    each in its own run.
    """
    choices = [session.default, *session.adapters]
    count = len(_LENGTHS)
    if session.bundle.mode != "folded":
        return [
            [choices[(start + row) % len(choices)] for row in range(count)]
            for start in range(0, len(choices), count)
        ]
    return [[name] * count for name in dict.fromkeys(choices)]


def _sources(session: Session, rows: Sequence[Sequence[int]], rng: np.random.Generator) -> list[Arrays]:
    """Returns the encoder inputs of each row: the row itself if the encoder reads tokens."""
    if "input_ids" in session.task.inputs:
        return [{"input_ids": np.array([ids], np.int64)} for ids in rows]
    (name,) = session.task.parts[0].inputs
    return [{name: rng.standard_normal((1, *session.shape(name))).astype(np.float32)} for _ in rows]


def _ordinary(
    session: Session,
    rows: Sequence[Sequence[int]],
    sources: Sequence[Arrays] | None,
    names: list[str | None],
    tokens: np.ndarray,
    tick: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Returns the ordinary graph's logits after each prompt and each step ``[1 + steps, rows,
    vocabulary]``.
    """
    going: DecoderOnly | EncoderDecoder
    if not session.task.has_encoder:
        given = Arrays()
        if OFFSETS in session.inputs and sources is not None:
            longest = max(map(len, rows)) + 1
            moved = [source[OFFSETS][0] for source in sources]
            given[OFFSETS] = np.stack([np.pad(one, ((longest - len(one), 0), (0, 0))) for one in moved])
        going = DecoderOnly(session, rows, names, given)
    else:
        assert sources is not None
        texts = []
        given = Arrays()
        if "input_ids" in sources[0]:
            texts = [source["input_ids"][0].tolist() for source in sources]
        else:
            given = {name: np.concatenate([source[name] for source in sources]) for name in sources[0]}
        going = EncoderDecoder(session, texts, names, given, rows[0])
    outputs = going.prefill()
    logits = [array_of(outputs["logits"])[range(len(rows)), going.last]]
    tick()
    for step_tokens in tokens:
        outputs = going.step(step_tokens, outputs)
        tick()
        logits.append(array_of(outputs["logits"])[:, -1])
    return np.stack(logits).astype(np.float32)


def _by_engine(
    batch: ModelRunner,
    prompts: Sequence[Sequence[int]],
    sources: Sequence[Arrays] | None,
    adapters: Sequence[ResidentAdapter | None],
    tokens: np.ndarray,
    piece: int,
    tick: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Returns the same logits from the engine's graph, which reads ``piece`` tokens of a prompt at a time."""
    given = zip(prompts, adapters, sources or [{}] * len(prompts), strict=True)
    first = []
    rows = [
        SequenceState(prompt=ids, adapter=adapter, features=source)
        if {OFFSETS, FEATURES} & source.keys()
        else SequenceState(prompt=ids, adapter=adapter, source=source)
        for ids, adapter, source in given
    ]
    for row in rows:
        batch.admit(row)
    for row in rows:
        while row.num_computed_tokens < len(row.prompt):
            left = len(row.prompt) - row.num_computed_tokens
            last = batch.prefill(left if row.whole else min(piece, left)).copy()
        first.append(last)
    logits = [np.stack(first)]
    tick()
    for step_tokens in tokens:
        for row, token in zip(rows, step_tokens, strict=True):
            row.next_token = int(token)
        logits.append(batch.decode())
        tick()
    for row in rows:
        batch.remove(row)
    return np.stack(logits).astype(np.float32)


def rederive(bundle: Bundle, folder: Path, before: Bundle) -> Bundle:
    """Derives the engine's graph from the ordinary graph in ``folder`` and returns the manifest of the
    unpublished ``bundle`` with it. The caches keep the dtype that they had ``before``.

    Raises:
        OutOfLimits, FormatError: ONNX Runtime cannot open what is in ``folder``.
        ParityError: the engine's graph disagrees with the ordinary one, or int8 caches move the logits too
            far.
    """
    try_opening(folder / GRAPH, sum(path.stat().st_size for path in folder.iterdir() if path.is_file()))
    rows = {key: before.parity[key] for key in ("long_rows",) if key in before.parity}
    made = dataclasses.replace(bundle, parity={**bundle.parity, **rows})
    made = with_decoder(made, folder, lambda text: None)
    if "cache" in before.parity.get("decoder", {}):
        made = with_report(made, cache=quantize_cache(folder))
    return made
