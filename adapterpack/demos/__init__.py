"""Runs every stage on a real model: ``adapterpack demo``."""
