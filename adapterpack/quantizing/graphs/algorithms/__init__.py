"""The algorithms that round weights to codes, one module each."""
