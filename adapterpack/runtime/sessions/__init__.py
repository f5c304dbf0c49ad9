"""Sessions of bundles: batches of rows, one pass or answers token by token; rows in files, and checks."""
