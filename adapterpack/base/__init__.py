"""A base model on disk: its checkpoint, its identity, and the formats in which weights are stored."""
