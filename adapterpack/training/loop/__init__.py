"""Prepares and runs one training: the model and its rows, the trainer and what methods add to it,
checkpoints, and the loss.
"""
