"""HTTP to and from a hub: listings, downloads, uploads, within limits of size and time."""
