"""The formats of training data for language models, one per file, and their encoding as token ids."""
