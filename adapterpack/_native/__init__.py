"""The compiled kernel for products of low-rank factors and the fold of a merge; numpy does the same where
nothing was compiled.
"""
