"""Adds packs to the model of a `pipeline`, and chooses one: labels change with it, and without any it is the
base again.

python examples/training/in_a_pipeline.py all-MiniLM-L6-v2 packs/tickets packs/reviews
"""

import sys

from transformers import pipeline

import adapterpack

TEXT = "My parcel has not arrived."


def main(base: str, *packs: str) -> dict[str, dict]:
    """What each pack answers."""
    classify = pipeline("text-classification", model=base, device="cpu")
    answers = {}
    for path in packs:
        pack = adapterpack.load(path)
        # checks the base, replays the pack's canary, and makes it the active one
        adapterpack.attach(classify.model, pack)
        answers[pack.name] = classify(TEXT)[0]
    for name in answers:
        adapterpack.active(classify.model, name)
        print(name, classify(TEXT)[0])
    adapterpack.detach(classify.model)
    print("base", classify(TEXT)[0])
    return answers


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(__doc__)
    main(*sys.argv[1:])
