"""The bundle, a deployable folder: its manifest and the signature of its graphs."""

FILE_NAME = "adapterpack.bundle.json"
"""The manifest of a bundle, which tells its folder from others."""
