"""The modules that hold adapters, one for each kind of layer."""
