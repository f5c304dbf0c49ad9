"""Fleets: many adapters of one base in shared bases, a small core each."""
