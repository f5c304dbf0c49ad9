"""The catalogue of methods as a page, read off the registry: ``python tests/method_catalogue.py >
docs/methods.md``.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from adapterpack.adapter_methods import INITS, Method, describe_traits, methods
from adapterpack.adapter_methods.nodes import NODES, traits

INTRO = """# Adapter methods

Every method that `adapterpack methods` lists; this page is made from the registry by `make golden`. In `train` a method is chosen by
`method: NAME`, and its hyper-parameters are keys of the same configuration. What a method promises is the table of traits; each promise is
tested for every method, see `tests/golden/matrix.md`. `W x + b` is the layer, `h` the output of a block.
"""


ABOUT_READERS = """## Who else loads a pack

What other libraries make of the folder of a pack as it is. PEFT and transformers are measured by `tests/test_readers.py` (here PEFT 0.21.2
and transformers 5.24): yes is within 1e-3 of the adapter's change. transformers' `load_adapter` has PEFT put the layers in, and does
without PEFT's own model, which does the rest. vLLM is its own loader, 0.33 (`tests/interop/vllm_loads.py`): of a LoRA it takes linear
layers and embeddings of language models, ranks up to 512, and no module that was trained whole. PEFT has other layouts in older versions:
0.14 reads OFT otherwise. A method that is not here (`convert --to peft` writes some), or at a kind of layer at which PEFT has none, gives
a folder that no other library loads; the card of a pack says who loads it, and `save` does, in its log.
"""

ABOUT_INITS = """## Initialisations

Of LoRA's branch, by `init: NAME`. Where the start is not zero it is taken off again: a fresh adapter changes nothing, and the base stays
what it is. `weight`, `moment` and `gradient` are what an initialisation looks at; the last two are measured on sample data.
"""

ABOUT_NODES = """## Nodes of a tree of composition

How packs work together when they run: `adapterpack compose A B --tree "arrow(a, b)" -o C`, or `compose([a, b], tree=...)`. `f_i` is
the layer with child i, `D_i` the change that it makes. A node that routes takes members of low rank that are added to the layer; any
other takes any member that acts on layers. `folds`: merge can put it into the weights. `in_graphs`: a bank or `inputs` bundle can hold it.
"""


def page(known: Iterable[Method]) -> str:
    """The catalogue in Markdown: methods by kind, traits, hyper-parameters, and the initialisations of
    low-rank branches.
    """
    listed = sorted(known, key=lambda method: method.name)
    parts = [INTRO]
    for kind in dict.fromkeys(sorted(method.kind for method in listed)):
        of_kind = [method for method in listed if method.kind == kind]
        rows = [[f"[{m.name}]({m.paper})", f"`{m.formula}`".replace("|", "\\|"), m.summary] for m in of_kind]
        parts.append(f"## Kind: {kind}\n\n{table(['method', 'formula', 'what it does'], rows)}")
    flags = [name for name, value in describe_traits(listed[0]).items() if isinstance(value, bool)]
    marks = [
        [
            m.name,
            *("yes" if describe_traits(m)[flag] else "-" for flag in flags),
            ", ".join(m.traits.layers),
            _peft(m),
        ]
        for m in listed
    ]
    parts.append(f"## Traits\n\n{table(['method', *flags, 'layers', 'PEFT'], marks)}")
    loading = [
        [
            m.name,
            "yes",
            m.peft.refused_by.get("transformers", "yes"),
            "-" if "vLLM" in m.peft.refused_by else "yes",
        ]
        for m in listed
        if m.peft is not None
        and "from_peft_with_base" not in m.peft.overrides
        and m.peft.to_config({"": m.examples[0]}) is not None
    ]
    parts.append(f"{ABOUT_READERS}\n{table(['method', 'PEFT', 'transformers', 'vLLM'], loading)}")
    settings = [
        [m.name, ", ".join(f"`{field.name}={_default(field)}`" for field in dataclasses.fields(m.config))]
        for m in listed
    ]
    parts.append(f"## Hyper-parameters and their defaults\n\n{table(['method', 'settings'], settings)}")
    inits = [
        [
            f"[{i.name}]({i.paper})",
            ", ".join(sorted(i.needs)) or "-",
            "yes" if i.cancels else "-",
            ", ".join(f"`{key}={value!r}`" for key, value in i.options.items()) or "-",
            i.summary,
        ]
        for i in INITS.values()
    ]
    parts.append(
        f"{ABOUT_INITS}\n{table(['init', 'needs', 'taken off', 'options', 'how the branch begins'], inits)}"
    )
    flags = list(traits(next(iter(NODES.values()))))
    kinds = [
        [
            f"[{kind.name}]({kind.paper})",
            f"`{kind.formula}`".replace("|", "\\|"),
            kind.summary,
            ", ".join(f"`{field.name}={_default(field)}`" for field in dataclasses.fields(kind.settings))
            or "-",
            *("yes" if traits(kind)[flag] else "-" for flag in flags),
        ]
        for kind in NODES.values()
    ]
    parts.append(f"{ABOUT_NODES}\n{table(['node', 'formula', 'what it does', 'settings', *flags], kinds)}")
    parts.append(
        "".join(
            f"- `{kind.name}` has no form in a graph: {kind.torch_only}.\n"
            for kind in NODES.values()
            if kind.torch_only
        )
    )
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows under a head, in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def _peft(method: Method) -> str:
    if method.peft is None:
        return "-"
    return (
        method.peft.peft_type
        if "from_peft_with_base" not in method.peft.overrides
        else f"{method.peft.peft_type}, by `convert --base`"
    )


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    return repr(value)


if __name__ == "__main__":
    sys.stdout.write(page(methods().values()))
