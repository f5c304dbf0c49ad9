"""Forward and backward passes for common structures of the normal form."""
