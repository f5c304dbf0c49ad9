"""The manifest of a pack: what it says, its versions, and the method that it describes."""
