"""The adapters of a running server: where packs come from, under which names they answer, and how they
change.
"""
