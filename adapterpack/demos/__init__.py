"""The whole line on a real model: ``adapterpack demo``."""
