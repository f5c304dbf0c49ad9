"""PEFT's own test cases, read from its source package and put through this package."""
