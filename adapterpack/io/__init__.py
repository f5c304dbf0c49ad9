"""Bytes on disk: reading strangers' files within limits, and writing files that are whole or absent."""
