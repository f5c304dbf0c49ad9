"""The validator of packs: checks in small files, one per group of rules, and a table of all of them in
``registry``.
"""
