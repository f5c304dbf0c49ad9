"""Text generation: the loop, how a decoder goes on, sampling, caches."""
