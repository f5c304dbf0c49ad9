"""The kinds of evaluation, one theme a file; each registers what it defines."""
