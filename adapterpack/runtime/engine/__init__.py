"""Engines: rows of many requests run in one batch, each with its own adapter, and come and go between
steps.
"""
