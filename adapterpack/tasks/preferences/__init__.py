"""The forms of data that say which of two answers is better, or whether one is good, one a file."""
