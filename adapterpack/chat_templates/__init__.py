"""Chat templates: convert messages to the text that a model expects, for training and the runtime alike."""
