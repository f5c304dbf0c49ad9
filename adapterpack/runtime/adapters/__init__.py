"""The adapters of a running session: in slots, in files, or as prompts, and the rows that hold them."""
