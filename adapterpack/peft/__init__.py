"""Reads and writes PEFT's adapter folders: the only place that knows PEFT's configuration and tensor
names.
"""
