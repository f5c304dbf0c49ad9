"""Carries an adapter to the next version of its base, by the weights of both bases and without data."""
