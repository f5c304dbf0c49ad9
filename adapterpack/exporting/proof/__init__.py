"""Proves that a graph computes the same as the model, by running both on the same inputs."""
