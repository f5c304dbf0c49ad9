"""Prepares the images and audio of requests as the arrays that a graph takes."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
