"""An adapter from two checkpoints, a fine-tuned one and its base; the reverse of a merge, without torch."""
