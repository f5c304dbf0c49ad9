"""Trains adapters: reads the configuration and the data, prepares the model, and runs
``transformers.Trainer`` or one of its relatives.
"""
