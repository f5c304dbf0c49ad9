"""The graph that the engine runs, made from a bundle's ordinary decoder and proved against it; whoever writes a bundle makes it here."""
