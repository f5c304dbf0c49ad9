"""Sessions on bundles: single passes and generation for batches, rows of files, and the validation of
bundles.
"""
