"""The compiled kernels, each behind a module that does the same in numpy where nothing was compiled: products
of low-rank factors and the fold of a merge (:mod:`.lowrank`), votes and counts over dense entries
(:mod:`.passes`).
"""
