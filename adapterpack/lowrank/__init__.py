"""Computes with sums of low-rank changes through their factors, so that no array of the size of a weight is
formed.
"""
