"""Audits: what packs do to the base and to each other, with a verdict."""
