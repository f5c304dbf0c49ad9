"""Chat templates: the form in which a model wants messages, as training and the runtime render it."""
