"""Audits packs before they are combined: what they do to the base and to each other, with a verdict."""
