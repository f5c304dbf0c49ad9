"""The engine: rows of many requests decode in one batch, each with its own adapter, and come and go between steps."""
