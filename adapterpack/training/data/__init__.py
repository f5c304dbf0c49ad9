"""The rows of a training: read from files and hubs, with limits, encoded, packed."""
