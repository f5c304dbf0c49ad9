"""The page of ``adapterpack audit --html``: the verdict first, then pairs, a map of the layers, spectra, losses, and sites to look at."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

from ..io.readable import MISSING, count, number, percent
from .audit_map import Grid, grid
from .heat import Line, Matrix, heat_map, spectrum_lines
from .html import Card, Code, Figure, Heading, KeyFigures, Paragraph, Section, Table, page

Result = Mapping[str, Any]
_TONES = ("c1", "c2", "c3", "c0")
_LISTED, _MAPPED = 15, 4


def audit_report(result: Result) -> str:
    """What ``Audit.to_json()`` gives as one self-contained HTML page; parts without figures are left out."""
    names = ", ".join(_names(result))
    title = f"Audit of {names}" if len(names) < 90 else f"Audit of {len(result['packs'])} packs"
    return page(title, list(chain.from_iterable(build(result) for build in _PARTS)), _footer(result))


def worst(result: Result, most: int = _LISTED) -> tuple[list[str], list[list[str]]]:
    """Column names and rows of the sites to look at first, and below them all sites together: for the page and for a terminal."""
    pairs, based = len(result["packs"]) > 1, result["base"] is not None
    columns = ["site", "of base" if based else "norm",
               *(["cosine", "overlap", "conflict", "interference", "least kept"] if pairs else ["effective rank"]),
               *(f"fold {dtype}" for dtype in result["dtypes"])]
    sites = sorted(result["sites"], key=lambda site: (-concern(site), site["path"]))[:most]
    rows = [_row(site["path"], site, [each["effective_rank"] for each in site["spectra"] if each["rank"]], pairs, based, result["dtypes"])
            for site in sites]
    if result["total"] is not None:
        ranks = [rank for index in range(len(result["packs"])) if (rank := effective_rank(result, index)) is not None]
        rows.append(_row("all sites", result["total"], ranks, pairs, based, result["dtypes"]))
    return columns, rows


def concern(site: Result) -> float:
    """What the sites are sorted by: interference, or for a lone pack the size of the change."""
    if len(site["norms"]) > 1:
        return number(site["interference"]["relative"]) or 0.0
    return number(site["relative_norms"][0]) or number(site["norms"][0]) or 0.0


def extreme(matrix: Matrix, least: float = 0.0) -> float | None:
    """Of the values off the diagonal the one that lies farthest from ``least``."""
    values = [value for i, row in enumerate(matrix) for j, value in enumerate(row) if i < j and value is not None]
    return max(values, key=lambda value: abs(value - least), default=None)


def effective_rank(result: Result, index: int) -> float | None:
    """One pack's effective rank over its sites, each weighted by its energy."""
    spectra = [site["spectra"][index] for site in result["sites"]]
    energy = math.fsum(each["energy"] for each in spectra)
    return math.fsum(each["energy"] * each["effective_rank"] for each in spectra) / energy if energy else None


def decimal(value: object, digits: int = 2) -> str:
    """A number with a few decimals, or that it is missing."""
    known = number(value)
    return MISSING if known is None else f"{known:z.{digits}f}"


def _row(
    name: str, found: Result, ranks: Sequence[float], pairs: bool, based: bool, dtypes: Sequence[str]
) -> list[str]:
    row = [name, _percent(found["combined"]["relative_norm"]) if based else _short(found["combined"]["norm"])]
    if not pairs:
        row.append(decimal(ranks[0] if ranks else None, 1))
    else:
        overlap = [value for side in ("outputs", "inputs") if (value := extreme(found["overlap"][side])) is not None]
        kept = [value for value in found["retained"] if value is not None]
        row += [decimal(extreme(found["cosine"])), decimal(max(overlap, default=None)), percent(extreme(found["conflict"]["pairs"], 0.5)),
                decimal(found["interference"]["relative"]), decimal(min(kept, default=None))]
    return row + [percent(found["fold"].get(dtype, {}).get("relative_error")) for dtype in dtypes]


def _names(result: Result) -> list[str]:
    return [str(pack["name"]) for pack in result["packs"]]


def _short(value: object) -> str:
    known = number(value)
    return MISSING if known is None else f"{known:.3g}"


def _percent(value: object) -> str:
    """A share that may be far below one percent."""
    known = number(value)
    return MISSING if known is None else f"{100 * known:.2g} %" if known < 0.1 else percent(known)


def _opening(result: Result) -> Iterator[Section]:
    verdict, total = result["verdict"], result["total"]
    yield Paragraph(verdict["summary"])
    if total is None:
        return
    cards = [Card("sites", f"{len(result['sites']):,}", f"of {len(result['packs'])} packs" if len(result["packs"]) > 1 else "of one pack")]
    relative = number(total["combined"]["relative_norm"])
    cards.append(Card("size of the sum" if len(result["packs"]) > 1 else "size of the change",
                      _short(total["combined"]["norm"]) if relative is None else _percent(relative),
                      "Frobenius norm" if relative is None else "of the weights' norm"))
    if len(result["packs"]) > 1:
        cards.append(Card("strongest cosine", decimal(extreme(total["cosine"])), "1 the same, 0 unrelated, -1 opposite"))
        cards.append(Card("sign conflict", percent(extreme(total["conflict"]["pairs"], 0.5)), "50 % is chance"))
    for dtype, loss in list(total["fold"].items())[:1]:
        cards.append(Card(f"lost in {dtype}", percent(loss["relative_error"]), "by rounding, if folded into the base"))
    yield KeyFigures(cards)


def _why(result: Result) -> Iterator[Section]:
    reasons = result["verdict"]["reasons"]
    if not reasons:
        return
    yield Heading("What speaks for it")
    yield from map(Paragraph, reasons)
    if rules := result["verdict"]["rules"]:
        yield Paragraph("Rules that fit, the first one first:")
        weights = "".join(f" --weight {weight:.3g}" for weight in result["verdict"]["weights"] or ())
        yield Code("\n".join(f"adapterpack compose PACK... --rule {rule}{weights} -o OUT" for rule in rules))


def _packs(result: Result) -> Iterator[Section]:
    total = result["total"]
    if total is None:
        return
    many, based = len(result["packs"]) > 1, result["base"] is not None
    columns = ["pack", "method", "sites", *(["weight"] if many else []), "norm", *(["of base"] if based else []), "effective rank",
               *(["kept by the sum"] if many else [])]
    rows = []
    for index, pack in enumerate(result["packs"]):
        rows.append([pack["name"], pack["method"], f"{pack['sites']:,}", *([f"{pack['weight']:.3g}"] if many else []),
                     _short(total["norms"][index]), *([_percent(total["relative_norms"][index])] if based else []),
                     decimal(effective_rank(result, index), 1), *([decimal(total["retained"][index])] if many else [])])
    yield Heading("The packs" if many else "The pack")
    yield Table(columns, rows, range(2, len(columns)),
                "The effective rank is how many directions a change uses evenly; the mean over the sites, weighted by energy."
                + (" Kept by the sum: the part of each pack that the weighted sum holds; 1 is all of it, below 0 it is reversed."
                   if many else ""))


def _pairs(result: Result) -> Iterator[Section]:
    names, total = _names(result), result["total"]
    if len(names) < 2 or total is None:
        return
    rows = [f"{index + 1}  {name}" for index, name in enumerate(names)]
    columns = [str(index + 1) for index in range(len(names))]
    yield Heading("Every pair")
    yield Paragraph("All sites together. The numbers below a figure are those of the packs at its left.")
    share: Callable[[float], str] = lambda value: f"{100 * value:.0f} %"  # noqa: E731
    for title, matrix, caption, middle, shown in (
        ("Cosine of the changes", total["cosine"], "Cosine of the changes: blue agrees, orange opposes, pale is unrelated.", 0.0, None),
        ("Sign conflict", total["conflict"]["pairs"],
         "Sign conflict: the share of what two packs change in common at which their signs differ. Orange is above chance (50 %), "
         "blue below.",
         0.5, share),
        ("Shared outputs", total["overlap"]["outputs"], "Shared outputs: how far two packs write into the same directions.", 0.0, None),
        ("Shared inputs", total["overlap"]["inputs"], "Shared inputs: how far two packs read the same directions.", 0.0, None),
    ):
        options: dict[str, Any] = {} if shown is None else {"shown": shown, "tones": ("c2", "c1")}
        blank = [[None if i == j else value for j, value in enumerate(line)] for i, line in enumerate(matrix)]
        yield Figure(heat_map(title, rows, columns, blank, middle=middle, written=True, **options), caption)


def _map(result: Result) -> Iterator[Section]:
    found = grid(result["sites"])
    if len(result["sites"]) < 2:
        return
    yield Heading("Layer by layer")
    yield Paragraph("One cell a site: layers from left to right, the modules of a layer below each other. Point at a cell for its value."
                    + (f" The {len(found.rows)} kinds of modules of the greatest concern are shown." if found.cut else ""))
    pairs = len(result["packs"]) > 1
    if pairs:
        yield _cells(found, "Cosine", lambda site: extreme(site["cosine"]),
                     "Cosine of the pair that is farthest from unrelated: blue agrees, orange opposes.", 1.0)
        yield _cells(found, "Interference", lambda site: site["interference"]["relative"],
                     "Singular task interference, relative to the size of the changes: how far packs use the same inputs and outputs "
                     "at once.")
        yield _cells(found, "Cancelled", lambda site: site["conflict"]["cancelled"],
                     "The share of all absolute values that cancels in the sum: orange is more than for unrelated packs "
                     f"({percent(_chance(result))}), blue is less.", 1.0, percent, middle=_chance(result), tones=("c2", "c1"))
    based = result["base"] is not None
    key = "relative_norms" if based else "norms"
    largest = max((value for site in result["sites"] for value in site[key] if value is not None), default=1.0) or 1.0
    for index, name in enumerate(_names(result)[:_MAPPED]):
        yield _cells(found, f"Size of {name}", partial(_of_pack, key, index), f"The size of the change of {name}"
                     + (", relative to the weight that it changes." if based else ".") + f" The strongest colour is "
                     f"{_percent(largest) if based else _short(largest)}" + (", of all packs." if pairs else "."), largest,
                     _percent if based else _short)
    for dtype in result["dtypes"][:1]:
        yield _cells(found, f"Lost in {dtype}", partial(_rounding, dtype),
                     f"The relative error of the change when it is folded into the base in {dtype}.", 1.0, percent)


def _of_pack(key: str, index: int, site: Result) -> Any:
    return site[key][index]


def _rounding(dtype: str, site: Result) -> Any:
    return site["fold"].get(dtype, {}).get("relative_error")


def _chance(result: Result) -> float:
    """What cancels in the sum of as many unrelated changes of one size."""
    return 1 - 1 / math.sqrt(len(result["packs"]))


def _cells(
    found: Grid, title: str, value: Callable[[Result], Any], caption: str, high: float | None = None,
    shown: Callable[[float], str] = decimal, **options: Any,
) -> Figure:
    cells = [[None if site is None else number(value(site)) for site in line] for line in found.cells]
    known = [abs(cell) for line in cells for cell in line if cell is not None]
    top = high if high is not None else max(known, default=1.0) or 1.0
    scale = "" if high is not None else f" The strongest colour is {shown(top)}."
    return Figure(heat_map(title, found.rows, found.columns, cells, high=top, shown=shown, **options), caption + scale)


def _spectra(result: Result) -> Iterator[Section]:
    lines: list[Line] = []
    for index, name in enumerate(_names(result)):
        curves = [[value / each["values"][0] for value in each["values"]]
                  for site in result["sites"] if (each := site["spectra"][index])["values"]]
        if curves:
            longest = max(map(len, curves))
            columns = [sorted(curve[at] if at < len(curve) else 0.0 for curve in curves) for at in range(longest)]
            low, middle, high = ([column[int(share * (len(column) - 1))] for column in columns] for share in (0.1, 0.5, 0.9))
            lines.append(Line(name, middle, (low, high) if len(curves) > 2 else None, _TONES[len(lines) % len(_TONES)]))
    if not lines:
        return
    yield Heading("Spectra")
    yield Paragraph("Singular values of the changes, each relative to the largest of its site: the line is the median over the sites, the "
                    "band holds eight of ten. A curve that falls early uses less rank than it has.")
    for start in range(0, len(lines), 3):
        shown = lines[start : start + 3]
        yield Figure(spectrum_lines(f"Spectra of {', '.join(line.label for line in shown)}", shown), "Index of the singular value.")


def _losses(result: Result) -> Iterator[Section]:
    total = result["total"]
    if total is None:
        return
    if total["truncation"]:
        yield Heading("What is lost")
        what = "the weighted sum" if len(result["packs"]) > 1 else "the change"
        yield Table([f"rank {rank}" for rank in total["truncation"]], [[_percent(loss) for loss in total["truncation"].values()]],
                    range(len(total["truncation"])), f"Relative error of {what}, if every site is cut to this rank.")
    if total["fold"]:
        rows = [[dtype, percent(loss["relative_error"]), percent(loss["kept"])] for dtype, loss in total["fold"].items()]
        yield Table(["stored in", "relative error", "kept"], rows, (1, 2), "What rounding leaves of it once it is folded into the base.")


def _sites(result: Result) -> Iterator[Section]:
    columns, rows = worst(result)
    if rows:
        yield Heading("Sites to look at first")
        yield Table(columns, rows, range(1, len(columns)),
                    f"{min(_LISTED, len(result['sites']))} of {len(result['sites'])} sites, "
                    + ("by interference." if len(result["packs"]) > 1 else "by size.")
                    + (" Cosine, overlap and conflict are those of the pair that stands out most, least kept that of the pack of which "
                       "the weighted sum holds least." if len(result["packs"]) > 1 else ""))


def _others(result: Result) -> Iterator[Section]:
    if result["whole"]:
        yield Heading("Modules trained whole")
        yield Table(["module", "packs", "numbers", "compose"],
                    [[each["path"], ", ".join(each["packs"]), count(each["numbers"]), each["treatment"]] for each in result["whole"]], (2,))
    if result["skipped"]:
        yield Heading("Not measured")
        yield Table(["pack", "site", "why"], [[each["pack"], each["path"], each["reason"]] for each in result["skipped"][:_LISTED]], (),
                    f"{len(result['skipped'])} in all." if len(result["skipped"]) > _LISTED else "")


def _footer(result: Result) -> str:
    sampled = [site for site in result["sites"] if site["sampled"]]
    how = (f"Signs and folds were looked at on a sample of rows at {len(sampled)} of {len(result['sites'])} sites, drawn by the site's "
           "name; all other figures are exact." if sampled else "All entries were looked at: the figures are exact to rounding.")
    approximated = [site["approximation"] for site in result["sites"] if site["approximation"]]
    return how + (f" {len(approximated)} changes have no low rank and were taken as factors, with a relative error of at most "
                  f"{_percent(max(approximated))}." if approximated else "")


_PARTS: tuple[Callable[[Result], Iterator[Section]], ...] = (
    _opening, _why, _packs, _pairs, _map, _spectra, _losses, _sites, _others,
)
"""The parts of the page, in reading order."""
