"""Schedules rows from requests to the engine: admission, a fair queue, and the thread that runs the engine's
steps.
"""
