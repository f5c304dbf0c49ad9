"""The algorithms that round weights to codes, one file each."""
