"""A server inside a process that has no address of its own for it."""
