"""The commands, a file each: ``command`` is what click runs."""
