"""Inputs of tracing and proof: a model's parts as torch modules, and example inputs."""
