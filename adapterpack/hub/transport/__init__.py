"""HTTP to and from a hub: listings, downloads and uploads, with limits of size and time."""
