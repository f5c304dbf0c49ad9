"""Creates every quantized form of a bundle in a temporary folder, one at a time, and measures each on the
same rows.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

from ...bundle import Bundle, read_bundle
from ...errors import AdapterpackError, ConfigError, NothingToDo, UnknownAdapter, require_among
from ...io import Say, scratch_folder
from ...merging.pipeline import merge
from ...paths import StrPath
from ...runtime import Session
from ..graphs import ALGORITHMS, GRAPH_SCHEMES, GraphOptions, GraphQuantization, quantization
from ..graphs.quantize_bundle import quantize_bundle
from .advice import advice
from .figures import figures
from .result import Comparison, QuantizedForm
from .rows import examples

RANK = 32
"""The default rank of a compensation."""


def compare_quantized(
    bundle: StrPath,
    rows: StrPath,
    *,
    adapter: str | None = None,
    schemes: Sequence[str] = ("int8", "int4"),
    progress: Say | None = None,
    **options: Unpack[GraphOptions],
) -> Comparison:
    """Compares the ways of quantizing a float bundle: each is made in a temporary folder and measured on the
    same rows, on the CPU.

    For each scheme it quantizes the base and attaches the float adapter (``attached``); the same with a
    correction of rank 32, or ``compensate`` (``compensated``, in a bank); or merges the adapter into the
    weights first (``merged``). The result lists a way that is not possible with the reason. Without adapters
    it only quantizes the base.

    Args:
        bundle: a float bundle of a model that generates text, or of a classifier.
        rows: a JSONL file of ``text``, ``messages``, or ``prompt`` and ``completion``; for a classifier, of
            its texts and ``label``. Use rows that the adapter was not trained on; only the first 128 count.
        adapter: its name; may be left out where the bundle has one.
        schemes: names of schemes of graphs.
        progress: called with a message at each step.
        options: as of :func:`adapterpack.quantize`; each is for the schemes that take it.

    Raises:
        UnknownName, UnknownAdapter: there is no such scheme or adapter.
        ConfigError: rows cannot be read, or options do not go together.
        NothingToDo: the bundle is quantized already.
        Unsupported: the task neither generates text from text nor gives one label a row.

    Example:
        >>> compare_quantized("bundle", "orders.test.jsonl", schemes=["int4"]).advice  # doctest: +SKIP
        ('int4: attach the float adapter to the quantized base: perplexity 1.08, merged first 1.13, ...', ...)
    """
    say = progress or (lambda text: None)
    source = Path(bundle)
    rank = options.pop("compensate", None) or RANK
    manifest = read_bundle(source)
    if manifest.quantization is not None:
        raise NothingToDo(
            "the bundle is quantized already", where=source, remedy="start from the float bundle"
        )
    chosen = _adapter(manifest, adapter)
    wanted = {scheme: _options_of(scheme, options, rank) for scheme in dict.fromkeys(schemes)}
    for name, value in options.items():
        if value is not None and all(name not in taken for _, _, taken in wanted.values()):
            raise ConfigError(
                "no scheme here takes this option",
                where=f"--{name.replace('_', '-')}",
                found=", ".join(wanted),
                remedy="leave it out",
            )
    session = Session(source, "cpu")
    asked = examples(session, Path(rows))
    del session
    with scratch_folder() as scratch:
        reference = figures(source, chosen, asked, _under("float", say))
        forms = [QuantizedForm("float", "float", reference, reference.agreement(reference))]
        merged = source if chosen is None else _merge(source, manifest, chosen, scratch / "merged", say)
        for scheme, (plain, corrected, _) in wanted.items():
            for way, how in _ways(manifest, chosen, plain, corrected):
                title = f"{scheme}, {way}"
                say(f"{title}: quantize")
                origin = merged if way == "merged" else source
                try:
                    if isinstance(origin, AdapterpackError):
                        raise origin
                    quantize_bundle(origin, scratch / "form", how)
                except AdapterpackError as error:
                    # the error's path is in a temporary folder, so it is left out
                    forms.append(QuantizedForm(scheme, way, None, None, error.placeless_sentence))
                    continue
                found = figures(
                    scratch / "form", None if way == "merged" else chosen, asked, _under(title, say)
                )
                shutil.rmtree(scratch / "form")
                forms.append(QuantizedForm(scheme, way, found, found.agreement(reference)))
    return Comparison(
        manifest.base.name or source.name,
        chosen,
        manifest.task,
        len(asked),
        int(reference.best.size),
        rank,
        tuple(forms),
        tuple(advice(forms, rank)),
    )


def _under(title: str, say: Say) -> Say:
    return lambda what: say(f"{title}: {what}")


_Wanted = tuple[GraphQuantization, GraphQuantization | None, frozenset[str]]
"""How a scheme quantizes without and with a correction (if it supports one), and the names of the options
that it uses.
"""


def _options_of(scheme: str, options: GraphOptions, rank: int) -> _Wanted:
    chosen: Any = GRAPH_SCHEMES[scheme]
    takes = chosen.takes | (frozenset({"error_budget", "size_budget"}) if chosen.budgeted else frozenset())
    given: dict[str, Any] = {
        name: value for name, value in options.items() if name in takes and value is not None
    }
    algorithm = ALGORITHMS.find(given.get("algorithm") or "")
    corrects = "compensate" in takes
    looks = chosen.budgeted or (algorithm is not None and algorithm.calibrated)
    plain = quantization(
        scheme, **{name: value for name, value in given.items() if name != "calibration" or looks}
    )
    return plain, quantization(scheme, **given, compensate=rank) if corrects else None, frozenset(given)


def _ways(
    bundle: Bundle, adapter: str | None, plain: GraphQuantization, corrected: GraphQuantization | None
) -> list[tuple[str, GraphQuantization]]:
    """Returns the ways of one scheme by name; merging first, the usual way in other tools, comes first."""
    attached = "attached" if adapter is not None else "quantized"
    ways = [("merged", plain)] if adapter is not None else []
    return [*ways, (attached, plain), *([("compensated", corrected)] if corrected is not None else [])]


def _adapter(bundle: Bundle, name: str | None) -> str | None:
    names = [adapter.name for adapter in bundle.adapters] if bundle.mode != "folded" else []
    if name is None and len(names) > 1:
        raise ConfigError(
            "the bundle has several adapters, and one at a time is compared",
            where="--adapter",
            expected=", ".join(names),
            remedy="name one with --adapter",
        )
    require_among("the bundle has no such adapter", name, names, UnknownAdapter)
    return name or next(iter(names), None)


def _merge(source: Path, bundle: Bundle, adapter: str, out: Path, say: Say) -> Path | AdapterpackError:
    """Merges an adapter into a bundle's float weights; returns the folder, or why that is not possible."""
    say("merge the adapter into the float weights")
    pack = next(source / one.path for one in bundle.adapters if one.name == adapter)
    try:
        merge(source, [pack], out)
    except AdapterpackError as error:
        return error
    return out
