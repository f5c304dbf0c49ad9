"""Every type of model of the installed transformers, tiny and random, through the whole line; what became of
each is ``tests/golden/families.tsv``, from which ``docs/families.md`` is made.
"""
