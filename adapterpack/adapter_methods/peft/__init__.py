"""PEFT's form of a method: its names, its configuration, and what its files say otherwise than a pack."""
