"""Checks the named base: that it is the pack's, its tokenizer and template, its tied weights, its size and
its quantization. AP701-AP706.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from difflib import unified_diff

from ....base import Checkpoint, Verdict, chat_template_of, compatibility, quantization
from ....errors import AdapterpackError, BaseMismatch
from ... import TEMPLATE, Pack
from .context import Budget, Subject
from .finding import Finding, check_rule

ANOTHER = check_rule("AP701", BaseMismatch)
TOKENIZER = check_rule("AP702")
TIED = check_rule("AP703")
SHARE = check_rule("AP704")
DIFFERS = check_rule("AP705")
QUANTIZED = check_rule("AP706")

_TOKENIZER_FILES = {"tokenizer_json": "tokenizer.json", "added_tokens": "added_tokens.json"}
_HEADS = ("lm_head", "embed_out", "decoder")
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "shared")
SAME = "same-as-base"
_DIFF_LINES = 40
_COMPARED = 200
"""Lines of a template that are compared with the other template."""


def base_model(s: Subject) -> Iterator[Finding]:
    """AP701: the named base is the pack's."""
    yield from base_findings(s.pack, s.base, s.budget, s.allow_structural)


def base_findings(
    pack: Pack, base: Checkpoint | None, budget: Budget, allow_structural: bool
) -> Iterator[Finding]:
    """Yields AP701 for any pack, including an imported one. A base of which only the structure matches is a
    warning if ``allow_structural`` permits it.

    A base whose weights are elsewhere can only show its structure, unless the hub lists its files; that is
    left open, without a warning.

    Raises:
        Spent: the time ran out before the base's bytes were read.
    """
    if base is None:
        return
    try:
        with base.watched(lambda: budget.require_time("the bytes of the base")):
            verdict = pack.require_base(base, allow_structural=allow_structural or not base.has_weights)
    except AdapterpackError as error:
        yield Finding(
            "AP701",
            "error",
            "base",
            error.sentence,
            error.remedy or "",
            type(error),
            "adapterpack.json",
            "/base",
        )
        return
    if verdict.name == "structural" and base.has_weights:
        yield ANOTHER.at("base", verdict.means, file="adapterpack.json", pointer="/base")._replace(
            severity="warning"
        )


def base_verdict(pack: Pack, base: Checkpoint | None, findings: Iterable[Finding]) -> Verdict | None:
    """Returns what is known about the base, for a pack without other errors; otherwise None, because it would
    mean nothing.
    """
    if base is None or any(
        finding.severity == "error" and finding.rule != ANOTHER.id for finding in findings
    ):
        return None
    return compatibility.compare(
        pack.manifest.base,
        compatibility.deciding_fingerprint(base, pack.manifest.base),
    )


def tokenizer(s: Subject) -> Iterator[Finding]:
    """AP702 and AP705: the base has the tokenizer and chat template of the training run; shows the difference
    between the templates.
    """
    carried = s.file_bytes.get(TEMPLATE)
    if s.base is None:
        return
    said = s.manifest.tokenizer
    theirs = chat_template_of(s.base)
    if said is not None:
        for field, name in _TOKENIZER_FILES.items():
            wanted = getattr(said, field)
            if wanted not in (None, SAME) and s.base.has_file(name, wanted) is False:
                yield TOKENIZER.at(
                    f"tokenizer, {field}",
                    f"the pack was trained with another {name} than the base has",
                    pointer=f"/tokenizer/{field}",
                )
        expected = said.chat_template
        if carried is not None and expected == SAME and theirs != _text(carried):
            yield TOKENIZER.at(
                "tokenizer, chat_template",
                "the manifest says that the template is the base's own, but it is not",
                pointer="/tokenizer/chat_template",
            )
        elif (
            carried is None
            and expected not in (None, SAME)
            and (theirs is None or hashlib.sha256(theirs.encode("utf-8")).hexdigest() != expected)
        ):
            yield TOKENIZER.at(
                "tokenizer, chat_template",
                "the pack was trained with another chat template than the base has",
                pointer="/tokenizer/chat_template",
            )
    if carried is not None and theirs != _text(carried):
        yield DIFFERS.at(
            TEMPLATE,
            "the chat template differs from the base's:\n" + difference(theirs or "", _text(carried)),
            file=TEMPLATE,
        )


def difference(base: str, carried: str) -> str:
    """Returns a unified diff of two templates, cut after 40 lines; in long templates only what follows the
    first difference is compared.

    Comparing everything would take time proportional to the product of their lengths.
    """
    base_lines, pack_lines = base.splitlines(), carried.splitlines()
    # The common beginning is skipped, because difflib takes quadratic time.
    same = next(
        (number for number, (old, new) in enumerate(zip(base_lines, pack_lines, strict=False)) if old != new),
        min(len(base_lines), len(pack_lines)),
    )
    start = max(same - 1, 0)
    stop = same + _COMPARED
    lines = list(
        unified_diff(base_lines[start:stop], pack_lines[start:stop], "base", "pack", lineterm="", n=1)
    )
    left_out = [lines[_DIFF_LINES:], base_lines[stop:], pack_lines[stop:]]
    more = [f"... and {sum(map(len, left_out))} more lines"] if any(left_out) else []
    return "\n".join(line[:200] for line in lines[:_DIFF_LINES] + more)


def tied(s: Subject) -> Iterator[Finding]:
    """AP703: the pack does not change only one of two tied weights."""
    if s.base is None or not s.base.config.get("tie_word_embeddings", False):
        return
    changed = {
        group.path.rpartition(".")[2]: (number, group.path) for number, group in enumerate(s.manifest.groups)
    }
    heads = [name for name in _HEADS if name in changed]
    embeddings = [name for name in _EMBEDDINGS if name in changed]
    if bool(heads) != bool(embeddings):
        number, path = changed[(heads or embeddings)[0]]
        yield TIED.at(
            path,
            "the base ties its embeddings and its head, and the pack changes only one of them",
            pointer=f"/groups/{number}",
        )


def share(s: Subject) -> Iterator[Finding]:
    """AP704: the pack has far fewer parameters than its base."""
    if s.base is not None:
        in_base = sum(math.prod(info.shape) for info in s.base.tensors.values())
        in_pack = sum(value.size for value in s.pack.tensors.values())
        if 2 * in_pack > in_base:
            yield SHARE.at(
                "tensors", f"the pack has {in_pack} parameters, its base {in_base}", pointer="/tensors"
            )


def quantization_trained_on(s: Subject) -> Iterator[Finding]:
    """AP706: the base is quantized as in training. It compares the quantization library, because that is what
    a checkpoint records.
    """
    trained = s.manifest.base_quantization
    if s.base is None or trained is None:
        return
    library = trained.params.get("library", trained.scheme)
    stored = quantization.scheme(s.base)
    if stored != library:
        yield QUANTIZED.at(
            "base_quantization",
            f"the pack was trained on the base as {trained.scheme} ({library}), and this one is stored "
            f"{'as plain numbers' if stored is None else f'by {stored}'}: it gives other outputs",
            pointer="/base_quantization",
        )


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="replace")
