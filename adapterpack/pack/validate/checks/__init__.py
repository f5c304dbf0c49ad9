"""The checks of a pack, one file per subject."""
