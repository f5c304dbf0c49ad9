"""Loads a task's model and tokenizer from a base, for training, tracing and comparing, without running code
of the base's own.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from ...base import Checkpoint
from ...base.base_folder import require_harmless
from ...errors import AdapterpackError, FormatError, StorageError, Unsupported, storage_errors
from ...library_errors import is_out_of_memory, library_errors
from ...runtime import Tokenizer
from ...runtime.text.model_files import read_bytes
from ...runtime.text.tokenizer import MAX_TOKENIZER, encoded_apart
from ...runtime.text.tokenizer_limits import is_quick, require_bounded_growth, require_bounded_load
from ...tasks import NO_TASK, Task, type_of
from ...tasks.data import MARKED
from .row_frequencies import separate_rows
from .size import bounded_build, require_fitting

_HELD = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def stored_dtype(folder: Path) -> str:
    """Returns the dtype, by torch's name, in which a base stores most of its float32, float16 or bfloat16
    values; float32 if it has none.
    """
    counts: Counter[str] = Counter()
    for info in Checkpoint(folder).stored.values():
        if info.dtype in _HELD:
            counts[_HELD[info.dtype]] += math.prod(info.shape)
    return max(counts, key=counts.__getitem__, default="float32")


def load_model(
    task: Task, folder: Path, labels: Sequence[str] | None = None, seed: int = 0, dtype: str = "float32"
) -> Any:
    """Returns the task's model on a base in ``dtype``; ``seed`` initialises a head that the base lacks."""
    return load_for_task(task, folder, labels, seed, dtype)[0]


def load_for_task(
    task: Task,
    folder: Path,
    labels: Sequence[str] | None = None,
    seed: int = 0,
    dtype: str = "float32",
    quantization: Any = None,
    problem: str | None = None,
) -> tuple[Any, list[str]]:
    """Returns the task's model, and the paths of the modules whose parameters the checkpoint lacks.

    ``quantization`` is a config of transformers, ``problem`` the problem type of a head.
    """
    settings: dict[str, Any] = {}
    if labels:
        settings = {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
            "problem_type": problem if problem in MARKED else None,
        }
    config = load_config(folder, task, **settings)
    require_class(task, config, folder)
    # A base with a head for other labels gets a new head.
    options: dict[str, Any] = {"ignore_mismatched_sizes": True} if task.heads else {}
    if quantization is not None:
        options["quantization_config"] = quantization
    torch.manual_seed(seed)
    # Silenced, because transformers warns of a new head, which is intended here.
    with quiet_transformers(), _loading_errors("model", folder), bounded_build(folder):
        model, report = _auto_class(task).from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            trust_remote_code=False,
            use_safetensors=True,
            **options,
        )
    separate_rows(model)
    # decoders that classify find the last token of a row by the padding id instead of the mask
    if "pad_token_id" in inspect.unwrap(type(model).forward).__code__.co_names:
        _name_padding(model.config.get_text_config(), folder)
        model.register_forward_pre_hook(_fill_padding, with_kwargs=True)
    sizes = {name: value.numel() for name, value in model.named_parameters()}
    new = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])} & sizes.keys()
    # A few new modules are a new head; more than half of the model means another architecture.
    if 2 * sum(sizes[name] for name in new) > sum(sizes.values()):
        raise Unsupported(
            "the checkpoint holds less than half of the task's model",
            where=folder,
            found=type(model).__name__,
            expected=f"weights such as {min(new)}",
            remedy="name a base of that architecture",
        )
    model.adapted_for = task.name
    return model, sorted({name.rpartition(".")[0] for name in new})


def _name_padding(config: Any, folder: Path) -> None:
    """Sets the config's padding id if it has none or one outside of the vocabulary: to the tokenizer's
    padding or end token, else the config's end token.
    """
    if type(config.pad_token_id) is int and 0 <= config.pad_token_id < config.vocab_size:
        return
    ends = config.eos_token_id
    candidates = [ends[0] if isinstance(ends, list) and ends else ends, 0]
    if (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer(folder)
        named = [tokenizer.special_tokens.get(name) for name in ("pad_token", "eos_token")]
        candidates = [*(tokenizer.core.token_to_id(token) for token in named if token), *candidates]
    config.pad_token_id = next(token for token in candidates if type(token) is int)


def _fill_padding(
    model: Any, args: tuple[Any, ...], inputs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Replaces masked ids by the model's padding id, as a pre-forward hook, so that a row gives the same
    result as alone.
    """
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    padding = model.config.get_text_config().pad_token_id
    if ids is None or mask is None or mask.shape != ids.shape or padding is None:
        return None
    return args, {**inputs, "input_ids": torch.where(mask > 0, ids, padding)}


def load_config(folder: Path, task: Task | None = None, **settings: Any) -> Any:
    """Returns transformers' config of a base, with a task's settings in it, without running code of the base.

    Raises:
        FormatError: the configuration is damaged, or describes another model than the checkpoint's.
        Unsupported: it names code.
    """
    require_harmless(folder)
    require_fitting(folder)
    if os.path.lexists(adapter := folder / _ADAPTER):
        raise Unsupported(
            "an adapter lies in the base's folder, and transformers would load it with the base",
            where=adapter,
            remedy="move it to a folder of its own",
        )
    with quiet_transformers(), _loading_errors("configuration", folder):
        return transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=False, **({} if task is None else task.config), **settings
        )


def empty_model(folder: Path, task: Task) -> Any:
    """Returns the task's model on a base without weights, on the meta device.

    Raises:
        FormatError: the configuration is damaged, or describes another model than the checkpoint's.
        Unsupported: it names code, or transformers has no class for the task and this base.
    """
    config = load_config(folder, task)
    require_class(task, config, folder)
    with quiet_transformers(), _loading_errors("model", folder), bounded_build(folder), torch.device("meta"):
        return _auto_class(task).from_config(config, trust_remote_code=False)


def require_class(task: Task, config: Any, folder: Path) -> None:
    """Raises unless transformers has a class for the task and this config, with an encoder and a decoder just
    where the task has both.

    Raises:
        Unsupported: there is none, and the error names the task of the base's own class; or it is of another
            form.
    """
    if type(config) not in _auto_class(task)._model_mapping:
        names = getattr(config, "architectures", None) or [None]
        own = type_of(names[0] if isinstance(names[0], str) else None, config.to_dict())
        raise Unsupported(
            "this base has no model for the task",
            where=folder,
            expected=f"a base for {task.name}",
            found=config.model_type,
            remedy="choose another base"
            + ("" if own in {NO_TASK, task.name} else f", or the base's own task, {own}"),
        )

    found = _auto_class(task)._model_mapping[type(config)]
    of = found[0] if isinstance(found, tuple) else found
    decodes = "decoder_input_ids" in inspect.signature(of.forward).parameters
    if task.has_encoder and not decodes:
        raise Unsupported(
            f"{task.name} is for encoders with a decoder, and this model answers in the text it reads",
            where=folder,
            expected="a model that takes decoder_input_ids",
            found=of.__name__,
            remedy="choose another base",
        )
    if task.generates and not task.has_encoder and decodes and config.is_encoder_decoder:
        raise Unsupported(
            f"{task.name} is for decoders, and this model has an encoder, too",
            where=folder,
            expected="a model without decoder_input_ids",
            found=of.__name__,
            remedy="choose another base",
        )


def _auto_class(task: Task) -> Any:
    """Returns the ``AutoModelFor...`` class of a task."""
    return getattr(transformers, task.auto_class)


def load_tokenizer(source: str | Path) -> Any:
    """Returns the tokenizer of a base, in a folder or under a name that transformers knows.

    Raises:
        StorageError: the base has none.
        FormatError: its files are damaged, or could take too long to load.
        Unsupported: the tokenizer is code in the base's folder.
    """
    folder = Path(source)
    if folder.is_dir():
        require_harmless(folder)
        # The tokenizer's class depends on the config, which transformers therefore reads.
        require_fitting(folder)
    if folder.is_dir() and not any(path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)):
        raise _no_tokenizer(folder)
    if (path := folder / "tokenizer.json").is_file():
        require_bounded_load(read_bytes(path, MAX_TOKENIZER), path)
    with _loading_errors("tokenizer", folder):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    # Without any of its files, some classes make a tokenizer with an empty vocabulary.
    files = tokenizer.vocab_files_names.values()
    if folder.is_dir() and files and not any((folder / name).is_file() for name in files):
        raise _no_tokenizer(folder)
    return bound_tokenizer(tokenizer, folder)


_ADAPTER = "adapter_config.json"
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "*.bpe")


def _no_tokenizer(folder: Path) -> StorageError:
    """Returns the error for a base without a tokenizer."""
    return StorageError(
        "the base has no tokenizer",
        where=folder,
        expected="tokenizer.json",
        remedy="save one with it: tokenizer.save_pretrained(folder), or name a base that has one",
    )


@contextlib.contextmanager
def _loading_errors(what: str, folder: Path) -> Iterator[None]:
    """Turns errors that transformers raises for unusable files into a :class:`FormatError`."""
    try:
        yield
    except AdapterpackError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0][:300].rstrip(".") or type(error).__name__
        raise FormatError(
            f"the base's {what} cannot be loaded: {reason}",
            where=folder,
            remedy="fetch the base again from where it came",
        ) from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences transformers' messages and progress bars inside the block."""
    level = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


def bound_tokenizer(tokenizer: Any, folder: Path) -> Any:
    """Returns the tokenizer; if its regular expressions may be slow, wrapped so that each text is first tried
    in the sandbox.

    Raises:
        FormatError: its rules could lengthen a text beyond the limit.
    """
    core = getattr(tokenizer, "backend_tokenizer", None)
    # A tokenizer in Python uses transformers' own regular expressions, which are trusted.
    if core is None:
        return tokenizer
    with library_errors("tokenizers", "this is not a tokenizer", where=folder):
        require_bounded_growth(core, folder)
        return tokenizer if is_quick(core) else _SlowTokenizer(tokenizer, core, folder)


class _SlowTokenizer:
    """A tokenizer whose expressions may be slow: tries each call in the sandbox first, and passes everything
    else to the wrapped tokenizer.
    """

    def __init__(self, tokenizer: Any, core: Any, folder: Path) -> None:
        self._tokenizer, self._folder = tokenizer, folder
        data = core.to_str().encode()
        with storage_errors("TMPDIR"):
            # The file exists as long as this object does.
            self._file = tempfile.NamedTemporaryFile(prefix="adapterpack-tokenizer-")  # noqa: SIM115
            self._file.write(data)
            self._file.flush()
        self._digest = hashlib.sha256(data).hexdigest()

    def __call__(self, *texts: str, add_special_tokens: bool = True, **options: Any) -> Any:
        """Returns what the wrapped tokenizer returns.

        Raises:
            OutOfLimits: the tokenizer takes too long for these texts.
        """
        encoded_apart(
            Path(self._file.name),
            self._digest,
            texts,
            {"add_special_tokens": add_special_tokens},
            self._folder,
        )
        return self._tokenizer(*texts, add_special_tokens=add_special_tokens, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)
