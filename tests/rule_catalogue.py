"""The catalogue of rules as a page, read off the registry: ``python tests/rule_catalogue.py >
docs/rules.md``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from method_catalogue import table
from rule_laws import LAWS, verdict

from adapterpack.composing.rules.rule import Laws, Rule, rules

INTRO = """# Rules of combination

Every rule that `adapterpack rules` lists; this page is made from the registry by `make golden`. A rule is chosen with
`adapterpack compose PACK... --rule NAME --param KEY=VALUE`, or `compose(packs, rule=..., params=...)`. `D_i = s_i B_i A_i` is the change of
pack i with the adapter's own scale inside, `w_i` its weight of any sign, `x_i = sgn(w_i) D_i`, `a_i = |w_i| / sum |w_i|`. Without weights
every pack counts 1/T, or 1 for the rules marked "1 each".

What a rule looks at decides what it costs and what comes out:

- **G**: the inner products of the changes alone. The result is a sum of the changes.
- **C**: the changes in their joint bases. The result is an adapter as it stands, of the rank of all packs together or less.
- **S**: rows or columns of the changes, scaled; or a small system of equations. The result is an adapter as it stands.
- **D**: every entry of the dense changes, a block of rows at a time. The result has no low rank: give a rank or an energy, or the
  largest rank of the packs is kept. What that cuts off is written into the pack's lineage and shown by the command.
- **F**: the factors one by one. LoRA-LEGO and RobustMerge get the changes' singular units here, which no training accident decides; PEFT's
  modes get the factors as they are stored, and warn.

`scope` says whether a rule measures each tensor for itself or the whole adapter: thresholds (TIES' trim and its relatives), angles, norms.
Random choices depend on `seed`, the pack's name, the site and the place of the entry, and not on threads, blocks, order or other packs.
"""

LAWS_INTRO = """## Laws

Each law is tested for every rule; where the table says no, the tests see it break. That a weight of 0 is the same as being absent, that
only an adapter's scale counts and not how rsLoRA writes it, and that a pack is the same after it was written and read, hold for all rules.
"""


def page(known: Iterable[Rule]) -> str:
    """What each rule computes, from what, with which parameters, and which laws it keeps, in Markdown."""
    listed = sorted(known, key=lambda rule: ("GCSDF".index(rule.needs), rule.name))
    rows = [
        [
            f"[{rule.name}]({rule.paper})",
            rule.needs,
            f"`{rule.formula}`".replace("|", "\\|"),
            rule.summary,
            "1 each" if rule.unit else "1/T",
            "yes" if rule.exact else "to the rank",
        ]
        for rule in listed
    ]
    settings = [
        [rule.name, ", ".join(f"`{name}={each.default!r}`" for name, each in rule.parameters.items()) or "-"]
        for rule in listed
    ]
    marks = [[rule.name, *("yes" if kept else "no" for kept in rule.laws)] for rule in listed]
    meanings = "\n".join(f"- {law.__name__}: {(law.__doc__ or '').strip()}" for law in LAWS)
    return (
        "\n\n".join(
            [
                INTRO.rstrip(),
                "## "
                f"Rules\n\n{table(['rule', 'class', 'formula', 'what it does', 'weights', 'exact'], rows)}",
                f"## Parameters and their defaults\n\n{table(['rule', 'parameters'], settings)}",
                f"{LAWS_INTRO}\n{meanings}",
                table(["rule", *Laws._fields], marks),
            ]
        )
        + "\n"
    )


def peft_page() -> str:
    """The same laws put to PEFT's ``add_weighted_adapter``, whose randomness is seeded for the purpose, in
    Markdown.
    """
    import peft
    from peft_rules import TYPES, Peft

    rows = [[f"`{kind}`", *(verdict(law, Peft(kind)) for law in LAWS)] for kind in TYPES]
    return f"""
## The same laws in PEFT {peft.__version__}

`add_weighted_adapter` on the same adapters, with torch's generator seeded before every call, density 0.5 (1 for identity and sums), and
`svd_rank` large enough to cut nothing. Not every law is a claim of the methods (TIES is no sum and has a mean's weights); the others are
what a combination of adapters means. `refused`: it raises an error.

{table(["combination_type", *(law.__name__ for law in LAWS)], rows)}
"""


if __name__ == "__main__":
    sys.stdout.write(page(rules().values()) + peft_page())
