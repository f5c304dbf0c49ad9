"""The training configuration: its fields, the names that other tools have for them, and its schema."""
