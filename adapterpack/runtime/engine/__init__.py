"""Engines: run many requests in one batch, each with its own adapter, and add and remove rows
between steps.
"""
