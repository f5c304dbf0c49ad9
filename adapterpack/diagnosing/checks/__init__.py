"""The checks of an installation, a file each."""
