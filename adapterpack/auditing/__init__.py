"""Audits packs before they are combined: measures how they affect the base and each other, and gives a
verdict.
"""
