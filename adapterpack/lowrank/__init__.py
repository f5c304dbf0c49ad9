"""Sums of low-rank changes computed in their factors, so that nothing of the size of a weight is formed."""
