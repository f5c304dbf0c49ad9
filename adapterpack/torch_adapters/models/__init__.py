"""Models of transformers without adapters: loaded, sized, and what of theirs takes strange inputs."""
