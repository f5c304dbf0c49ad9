"""The bundle, a deployable folder: its manifest and the signature of its graphs."""
