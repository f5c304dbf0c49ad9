"""The invariants of adapter methods that take models, graphs or PEFT to prove; the rest are in adapterpack.testing."""
