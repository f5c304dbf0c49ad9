"""Smaller packs and bundles, with the error measured."""
