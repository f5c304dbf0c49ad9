"""The rows of a training: their files, what of them is learned from, and how they are packed."""
