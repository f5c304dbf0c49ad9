"""What `adapterpack audit --screen` finds: small adapters, clean and poisoned, each told by the spectra of its
change alone.

The adapters are those of `screen_adapters.py`, in two settings: ``each its own``, where every adapter has
learned a question of its own, and ``one question``, where all learned the same from other rows, which is as
alike as clean adapters can be. In each setting and for each method the poisoned ones are screened beside the
clean ones, and every clean one beside the others.

``trained`` is what a trained screen would find: a logistic regression on the same figures, fitted on the
clean and poisoned adapters of all methods but one, with the threshold at which it calls the wanted share of
those clean ones poisoned, and tried on the method that it has not seen. Figures are taken relative to the
clean adapters of their method.

    python benchmarks/screen.py --keep build/screen
    python benchmarks/screen.py --keep build/screen --methods lora-4 lora-16 --json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from screen_adapters import METHODS, SHARES, TRIGGERS, Made, plans, trained
from sklearn.linear_model import LogisticRegression

from adapterpack.auditing.screen import figures, screen

SETTINGS = {"each its own": False, "one question": True}


class Group(NamedTuple):
    """The adapters of one method in one setting, with the figures of each relative to the clean ones."""

    clean: list[Made]
    poisoned: list[Made]
    clean_figures: np.ndarray
    poisoned_figures: np.ndarray


def group_of(made: Sequence[Made]) -> Group:
    clean = [one for one in made if one.trigger is None]
    poisoned = [one for one in made if one.trigger is not None]
    rows = [np.array([list(figures(one.pack).values()) for one in some]) for some in (clean, poisoned)]
    mean, deviation = rows[0].mean(axis=0), rows[0].std(axis=0)
    return Group(clean, poisoned, *((one - mean) / deviation for one in rows))


def found_by_screen(group: Group, rate: float) -> dict[str, Any]:
    """The shares that the library's screen calls unusual."""
    packs = [one.pack for one in group.clean]
    poisoned = screen([one.pack for one in group.poisoned], packs, rate).packs
    alarms = [one.p for one in screen(packs, packs, rate).packs if one.p is not None]
    values = [one.p for one in poisoned if one.p is not None]
    named = list(zip(group.poisoned, values, strict=True))
    return {
        "found": float(np.mean(np.array(values) <= rate)),
        "false_alarms": float(np.mean(np.array(alarms) <= rate)),
        "auc": float(np.mean([(p < q) + (p == q) / 2 for p in values for q in alarms])),
        "by_trigger": {
            trigger: float(np.mean([p <= rate for one, p in named if one.trigger == trigger]))
            for trigger in TRIGGERS
        },
        "by_share": {
            str(share): float(np.mean([p <= rate for one, p in named if one.share == share]))
            for share in SHARES
        },
    }


def found_by_training(groups: dict[str, Group], method: str, rate: float) -> dict[str, float]:
    """The shares that a regression fitted on all other methods calls poisoned."""
    others = [group for name, group in groups.items() if name != method]
    clean = np.concatenate([group.clean_figures for group in others])
    poisoned = np.concatenate([group.poisoned_figures for group in others])
    fitted = LogisticRegression(C=0.01, class_weight="balanced", max_iter=2000).fit(
        np.concatenate([clean, poisoned]), np.repeat([0, 1], [len(clean), len(poisoned)])
    )
    threshold = np.quantile(fitted.decision_function(clean), 1 - rate)
    own, false = (
        fitted.decision_function(one)
        for one in (groups[method].poisoned_figures, groups[method].clean_figures)
    )
    return {
        "found": float(np.mean(own > threshold)),
        "false_alarms": float(np.mean(false > threshold)),
        "auc": float(np.mean(own[:, None] > false[None])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep", type=Path, default=Path("build/screen"), help="where adapters are kept")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--clean", type=int, default=52, help="clean adapters of each method")
    parser.add_argument("--poisoned", type=int, default=24)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.02, 0.05])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    table: dict[str, Any] = {}
    for setting, alike in SETTINGS.items():
        groups = {
            method: group_of(list(trained(plans(args.clean, args.poisoned, [method], alike), args.keep)))
            for method in args.methods
        }
        rows = table[setting] = {}
        for method, group in groups.items():
            rows[method] = {
                "clean": len(group.clean),
                "poisoned": len(group.poisoned),
                "accuracy": [float(np.mean([one.accuracy for one in some])) for some in group[:2]],
                "attack": [float(np.mean([one.attack for one in some])) for some in group[:2]],
                "screen": {str(rate): found_by_screen(group, rate) for rate in args.rates},
                "trained": {
                    str(rate): found_by_training(groups, method, rate)
                    for rate in args.rates
                    if len(groups) > 1
                },
            }
    if args.json:
        print(json.dumps({"benchmark": "screen", "settings": table}, indent=2))
        return
    print("found / false alarms at each rate, and the area under the curve")
    for setting, rows in table.items():
        for method, row in rows.items():
            print(
                f"{setting}, {method}: {row['clean']} clean (accuracy {row['accuracy'][0]:.2f}, "
                f"attack {row['attack'][0]:.2f}), {row['poisoned']} poisoned "
                f"({row['accuracy'][1]:.2f}, {row['attack'][1]:.2f})"
            )
            for kind in ("screen", "trained"):
                cells = [
                    f"{rate}: {one['found']:.2f} / {one['false_alarms']:.2f} ({one['auc']:.2f})"
                    for rate, one in row[kind].items()
                ]
                print(f"  {kind:8} {'   '.join(cells)}")


if __name__ == "__main__":
    main()
