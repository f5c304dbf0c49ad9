"""The manifest of a pack: its fields and limits, its versions, and the method that it describes."""
