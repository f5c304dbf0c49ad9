"""Measures adapters on rows with known answers, by the measures of their task."""
