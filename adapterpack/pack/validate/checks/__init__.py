"""The checks of a pack, one file a subject."""
