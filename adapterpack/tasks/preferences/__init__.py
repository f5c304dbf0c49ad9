"""The formats of data that say which of two answers is better, or whether an answer is good, one per file."""
