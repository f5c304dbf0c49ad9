"""Holds adapters in torch models: finds the sites that they change, wraps the modules there, and attaches,
saves and detaches adapters.
"""
