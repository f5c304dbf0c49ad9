"""The stages of the line, in order: each takes the case of one type and raises what is wrong."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import noise
import numpy as np
import openai
import torch
from invariants.bundles import Reference, check
from PIL import Image
from serving.servers import ANN, WAIT, begin
from vision_models import PICTURES, url
from word_tokenizer import write_tokenizer

from adapterpack import Engine, Session, adapt, attach, export, load, merge, quantize, save, validate
from adapterpack.adapter_methods.lora import LoRA
from adapterpack.base.thresholds import rows_past
from adapterpack.bundle.decoder_graph import without_decoder
from adapterpack.errors import NothingToDo, Unsupported
from adapterpack.exporting.proof.parity_runs import row_of
from adapterpack.exporting.tracing.example_inputs import example
from adapterpack.quantizing.graphs.measure import NONE_BELOW
from adapterpack.runtime.prompts import start_ids
from adapterpack.runtime.sessions.generate import encode_images
from adapterpack.runtime.text.model_files import context_of
from adapterpack.tasks.one_pass import OnePass, PreparedRow
from adapterpack.tasks.task import get_task
from adapterpack.testing import require
from adapterpack.torch_adapters.canaries.inputs import token_types
from adapterpack.torch_adapters.models.load import load_model
from adapterpack.training.loop.preparing import linear_parts

from .processors import make_processor
from .sizes import CONTEXT
from .tiny import make_base

NEAR = 2e-5
"""Of the largest output: rounding of float32 in another order."""
TOKENS = 12
SEEING = "image-text-to-text"
ROWS: tuple[tuple[int, str | None], ...] = ((6, None), (2, "one"), (9, "two"), (1, "one"))
"""Tokens of the rows of a mixed batch, and the adapter of each."""
RANKS = {"one": 4, "two": 2}


_WORDS = {"input_ids", "attention_mask", "decoder_input_ids", "token_type_ids", "position_ids"}
"""Inputs that are said by a prompt."""


class Case:
    """One type, its files in ``folder``, and what its stages made so far."""

    def __init__(self, task: str, kind: str, folder: Path) -> None:
        self.task, self.kind, self.folder = get_task(task), kind, folder
        self.base, self.bundle = folder / "base", folder / "bundle"
        self.trained: dict[str, Any] = {}
        self.model: Any = None
        self.processor: Any = None
        self.blind: Unsupported | None = None
        """Why a model of images and texts is given texts alone."""

    @cached_property
    def session(self) -> Session:
        return Session(self.bundle, "cpu")

    @cached_property
    def known(self) -> dict[str | None, Reference]:
        """Plain transformers without an adapter, and with each."""
        packs = {name: load(self.folder / name) for name in RANKS}
        bare = Reference(self.task, self.base, double=False)
        return {None: bare} | {
            name: Reference(self.task, self.base, pack, double=False) for name, pack in packs.items()
        }

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of single rows: one, few, many, and on both sides of whatever the configuration says."""
        if "input_ids" not in self.task.inputs:
            return [1]
        images = self.example((2,))["input_ids"].shape[1] - 2
        longest = (context_of(self.session) or CONTEXT) - images
        past = rows_past(self.model.config.to_dict(), 1, 2, 2, longest).whole
        return sorted(length for length in {1, 3, 37, *past} if length <= longest)

    def example(self, lengths: Sequence[int] = (9, 5), seed: int = 2) -> dict[str, np.ndarray]:
        """Random inputs."""
        bare = range(len(lengths)) if self.blind else ()
        return example(self.task, self.model.config, lengths, model=lambda: self.model, seed=seed, bare=bare)

    def outputs(self, model: Any) -> torch.Tensor:
        """What a model says of an example, as one vector."""
        with torch.no_grad():
            try:
                return _flat(model(**self.torch_example()))
            except Exception as error:  # one that takes no text alone
                raise self.blind or error  # noqa: B904 - the cause

    def torch_example(self) -> dict[str, torch.Tensor]:
        """The example as a model takes it."""
        given = {key: torch.from_numpy(one) for key, one in self.example().items()}
        return given | self.types(given)

    @property
    def image_token(self) -> int | None:
        """The id that stands for an image in texts with images."""
        return self.model.config.image_token_id if "image_features" in self.task.main.inputs else None

    def types(self, given: dict[str, torch.Tensor], answered: int = 0) -> dict[str, torch.Tensor]:
        """The types of tokens of texts with images, of which the last are answers."""
        if "image_features" not in self.task.main.inputs:
            return {}
        ids = given["input_ids"]
        return token_types(
            self.model, ids, torch.arange(ids.shape[1]).expand_as(ids) >= ids.shape[1] - answered
        )


def _flat(said: Any) -> torch.Tensor:
    values = [
        one.float().flatten()
        for name, one in said.items()
        if isinstance(one, torch.Tensor) and one.is_floating_point() and "loss" not in name
    ]
    return torch.cat(values)


def _require_near(found: Any, right: Any, what: str, near: float = NEAR) -> None:
    require(found.shape == right.shape, f"{what}: shape {tuple(found.shape)}, not {tuple(right.shape)}")
    error, size = float(abs(found - right).max()), float(abs(right).max())
    require(error <= near * size, f"{what}: off by {error:.2g}, of {size:.2g}")


def build(case: Case) -> None:
    """The type is a tiny random model, saved and loaded."""
    make_base(case.task, case.kind, case.base)
    write_tokenizer(case.base)
    case.model = load_model(case.task, case.base).eval()
    if case.task.name == SEEING:
        try:
            case.processor = make_processor(case.kind, case.model, case.base)
        except Unsupported as refusal:  # export says so, too
            case.blind = refusal


def _layers(case: Case) -> Any:
    """All linear layers; of a model of images that has none but its head the convolutions."""
    layers = [
        (path, one) for path, one in case.model.named_modules() if path.split(".")[0] not in case.task.heads
    ]
    if any(isinstance(one, torch.nn.Linear) for _, one in layers):
        return "all-linear"
    convolutions = {path.rpartition(".")[2] for path, one in layers if isinstance(one, torch.nn.Conv2d)}
    return tuple(convolutions) or "all-linear"  # GPT-2's are of a class of its own


def train(case: Case) -> None:
    """A LoRA of all linear layers gets gradients; afterwards it has random values."""
    targets = (case.task.training and case.task.training.adapted) or _layers(case)
    plain = case.outputs(case.model)
    require(bool(torch.isfinite(plain).all()), "outputs that are not finite")
    for seed, (name, rank) in enumerate(RANKS.items()):
        model = load_model(case.task, case.base)
        found = ((head, getattr(model, head, None)) for head in case.task.heads)
        heads = tuple(path for head, one in found if one is not None for path in linear_parts(head, one))
        adapt(model, LoRA(r=rank, targets=targets, modules_to_save=heads), name)
        given = case.torch_example()
        # as a trainer does: what a cache keeps is written in place
        more = {"use_cache": False} if case.task.generates else {}
        _flat(model.eval()(**given, **more)).square().mean().backward()
        reached = [
            one.grad is not None and bool(one.grad.any()) for one in model.parameters() if one.requires_grad
        ]
        require(any(reached), "no gradient reaches the adapter")
        case.trained[name] = noise.shake(model, 0.1, seed + 1)
        require(not torch.equal(case.outputs(model), plain), "the adapter changes nothing")


def keep(case: Case) -> None:
    """The adapters are packs, which validate."""
    for name, model in case.trained.items():
        save(model, case.folder / name, base=case.base, name=name)
        report = validate(case.folder / name, case.base)
        require(report.valid, "; ".join(f"{one.rule} {one.message}" for one in report.findings))


def attached(case: Case) -> None:
    """The packs on a model that is loaded anew give what was saved."""
    for name, model in case.trained.items():
        again = attach(load_model(case.task, case.base).eval(), load(case.folder / name))
        _require_near(case.outputs(again), case.outputs(model), name, 1e-6)


def merged(case: Case) -> None:
    """So does a checkpoint into which one is merged."""
    merge(case.base, [case.folder / "one"], case.folder / "merged")
    again = load_model(case.task, case.folder / "merged").eval()
    _require_near(case.outputs(again), case.outputs(case.trained["one"]), "merged")


def exported(case: Case) -> None:
    """A bank of both, proved by the export itself."""
    packs = [case.folder / name for name in RANKS]
    export(case.base, packs, case.bundle, mode="bank", task=case.task.name)


def single(case: Case) -> None:
    """Rows of all lengths, each alone, with every adapter; on caches, too."""
    for length in case.lengths:
        try:
            check(case.session, case.known, (length,), NEAR)
        except AssertionError as error:
            raise AssertionError(f"a row of {length} tokens: {error}") from error


def mixed(case: Case) -> None:
    """A ragged batch with another adapter in each row, padded on either side."""
    check(case.session, case.known, [tokens for tokens, _ in ROWS[:3]], NEAR)


def _prompts(case: Case) -> Iterator[tuple[dict[str, np.ndarray], str | None]]:
    batch = case.example([tokens for tokens, _ in ROWS])
    for row, (_, name) in enumerate(ROWS):
        yield row_of(batch, row, case.image_token), name


def greedy(case: Case) -> None:
    """Tokens chosen with another adapter in each row are those of transformers without a cache."""
    if not case.task.generates:
        return
    rows, names = zip(*_prompts(case), strict=True)
    asked = [row["input_ids"][0].tolist() for row in rows] if "input_ids" in rows[0] else []
    batch = case.example([tokens for tokens, _ in ROWS])
    given = {key: one for key, one in batch.items() if key not in _WORDS}
    answers = case.session.generate(asked, list(names), given=given or None, max_new_tokens=TOKENS)
    for place, (row, name, answer) in enumerate(zip(rows, names, answers, strict=True)):
        _require_tokens(case, row, name, list(answer.ids), f"row {place} with {name}")


@torch.no_grad()
def _require_tokens(
    case: Case, row: dict[str, np.ndarray], name: str | None, found: list[int], what: str
) -> None:
    """Each token is the likeliest, or as likely as the rounding can tell."""
    ids = "decoder_input_ids" if case.task.has_encoder else "input_ids"
    given = {key: torch.from_numpy(one) for key, one in row.items() if key not in ("attention_mask", ids)}
    begun = start_ids(case.session) if case.task.has_encoder else row[ids][0].tolist()
    # a model may choose the token of images in an answer, which its own code takes for one of an image
    fed = list(takewhile(lambda token: token != case.image_token, found))
    whole = torch.tensor([[*begun, *fed]])
    more = {} if case.task.has_encoder else {"attention_mask": torch.ones_like(whole)}
    more |= case.types({ids: whole}, len(fed))
    logits = (
        case.known[name].model(**given, **more, **{ids: whole}, use_cache=False).logits[0, len(begun) - 1 :]
    )
    for step, token in enumerate(found[: len(fed) + 1]):
        best = logits[step].max()
        lost = float(best - logits[step, token])
        require(
            lost <= NEAR * float(logits[step].abs().max()),
            f"{what}: token {step} is {token}, less by {lost:.2g}",
        )
    if len(fed) == len(found) < TOKENS:
        ends = case.model.generation_config.eos_token_id
        last = int(logits[len(found)].argmax()) if found and found[-1] != ends else ends
        require(last == ends, f"{what}: ends after {len(found)} tokens")


def engine(case: Case) -> None:
    """The engine answers rows that come one after the other as transformers does each alone."""
    if case.task.generates:
        _engine_of_decoders(case)
    else:
        _engine_of_encoders(case)


def _engine_of_decoders(case: Case) -> None:
    if not case.session.bundle.decoder:
        raise without_decoder(case.session.bundle, Path("bundle"))
    running = Engine(case.bundle, "cpu", max_rows=3)
    rows, found = {}, dict[int, list[int]]()
    for row, name in _prompts(case):
        features = {key: row[key] for key in row.keys() - _WORDS}
        prompt = row["input_ids"][0].tolist() if "input_ids" in row else ()
        if not case.task.has_encoder:  # the engine takes what an image became
            packs = [None if name is None else case.session.packs[name]]
            (features,) = encode_images(case.session, [prompt], packs, features)
        rows[running.add(prompt, name, features=features or None, max_new_tokens=TOKENS)] = row, name
        _take(running.step(), found)
    while running.busy:
        _take(running.step(), found)
    for number, (row, name) in rows.items():
        _require_tokens(case, row, name, found.get(number, []), f"engine, request {number} with {name}")


def _take(events: Any, found: dict[int, list[int]]) -> None:
    for event in events:
        if event.error is not None:
            raise event.error
        if event.token is not None:
            found.setdefault(event.request, []).append(event.token)


def _engine_of_encoders(case: Case) -> None:
    running: Any = Engine(case.bundle, "cpu", max_rows=3)
    require(isinstance(case.task.answer, OnePass), "rows do not take one pass each")
    running._answer = dataclasses.replace(case.task.answer, result=lambda *given: dict(given[2]))
    rows = {}
    for row, name in _prompts(case):
        pack = None if name is None else running.bundle.pack(name)
        request = running.bind(PreparedRow(row), running._answer.options_of({}), pack)
        running.submit(request)
        rows[request.number] = row, name
    ended: dict[int, Any] = {}
    while running.busy:
        for event in running.step():
            if event.error is not None:
                raise event.error
            ended[event.request] = event.result
    for number, (row, name) in rows.items():
        right, found = case.known[name](row), ended[number]
        require(bool(shared := sorted(found.keys() & right.keys())), "none of the model's outputs")
        for key in shared:
            cut = tuple(slice(size) for size in right[key].shape)
            _require_near(found[key][cut], right[key], f"engine, {key} of request {number} with {name}")


def int4(case: Case) -> None:
    """Four bits, whose answers differ by what the bundle records."""
    try:
        quantized = quantize(case.bundle, case.folder / "int4", scheme="int4")
    except NothingToDo:
        return
    report: Any = quantized.quantization  # type: ignore[union-attr]
    recorded = report["error_by_accuracy"][report["accuracy"]]
    batch, names = case.example([tokens for tokens, _ in ROWS]), [name for _, name in ROWS]
    plain, coarse = (one.run(batch, names) for one in (case.session, Session(case.folder / "int4", "cpu")))
    key = next(key for key in plain if not key.startswith(("present", "encoder")))
    real = plain[key] > NONE_BELOW
    change, size = (np.sqrt(np.square(one[real]).mean()) for one in (coarse[key] - plain[key], plain[key]))
    require(change <= 4 * recorded * size, f"off by {change:.2g}, of {size:.2g}; recorded {recorded:.2g}")


def pictures(case: Case) -> None:
    """OpenAI's client asks a server about pictures of several sizes, with another adapter in each message; the
    answers are those of transformers to what the type's own processor makes of text and pictures.
    """
    require(
        case.processor is not None, "transformers makes its processor with a library that is not installed"
    )
    server = begin(case.bundle, case.folder, sampling="greedy")
    try:
        client = openai.OpenAI(base_url=f"{server.address}/v1", api_key=ANN, max_retries=0, timeout=WAIT)
        for place, (name, *parts) in enumerate(MESSAGES):
            messages: Any = [{"role": "user", "content": [_part(one) for one in parts]}]
            said = client.chat.completions.create(
                model=name or "base", messages=messages, max_tokens=TOKENS, temperature=0
            )
            ids, wanted = _answer(case, name, parts)
            assert said.usage is not None
            require(
                said.usage.prompt_tokens == ids,
                f"message {place}: {said.usage.prompt_tokens} tokens, not {ids}",
            )
            require(said.choices[0].message.content == wanted, f"message {place} with {name}: another answer")
    finally:
        server.process.kill()
        server.process.wait(WAIT)


MESSAGES: tuple[tuple[Any, ...], ...] = (
    ("one", PICTURES[0], "w60 w61"),
    ("two", PICTURES[1], "w62", PICTURES[0], "w63 w64"),
    (None, PICTURES[2], "w65"),
)
"""The adapter of a message, and its parts: texts and pictures."""


def _part(part: str | bytes) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image_url", "image_url": {"url": url(part)}}


@torch.no_grad()
def _answer(case: Case, name: str | None, parts: Sequence[str | bytes]) -> tuple[int, str]:
    """How many tokens a message has, and the answer of transformers itself."""
    text = "".join(f"{one} " if isinstance(one, str) else case.processor.image_token for one in parts)
    images = [Image.open(io.BytesIO(one)) for one in parts if isinstance(one, bytes)]
    given = case.processor(text=[text], images=[images], return_tensors="pt", add_special_tokens=False)
    count = given["input_ids"].shape[1]
    found = case.known[name].model.generate(**given, max_new_tokens=TOKENS, do_sample=False)
    return count, case.processor.decode(found[0, count:], skip_special_tokens=True)


class Stage(NamedTuple):
    """``needs`` are the stages without which it cannot be tried; ``level`` is what the type has reached when
    it and all of the lower levels passed. One that has a ``task`` is of that alone.
    """

    name: str
    run: Callable[[Case], None]
    needs: tuple[str, ...] = ()
    level: int | None = None
    task: str | None = None


STAGES: tuple[Stage, ...] = (
    Stage("build", build, level=1),
    Stage("train", train, ("build",), 1),
    Stage("save", keep, ("train",), 1),
    Stage("attach", attached, ("save",), 1),
    Stage("merge", merged, ("save",)),
    Stage("export", exported, ("save",), 2),
    Stage("rows", single, ("export",), 3),
    Stage("mixed", mixed, ("export",), 3),
    Stage("greedy", greedy, ("export",), 3),
    Stage("engine", engine, ("export",), 4),
    Stage("int4", int4, ("export",)),
    Stage("pictures", pictures, ("export",), task=SEEING),
)
"""In the order in which they run."""
