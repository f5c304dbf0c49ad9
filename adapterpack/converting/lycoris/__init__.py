"""What a module of a kohya file can hold, in the forms of LyCORIS."""
