"""What a model is traced and proved with: its parts as torch modules, and example inputs."""
