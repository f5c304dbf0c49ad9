"""PEFT's adapter folders, in and out: the one place for its configuration and tensor names."""
