"""Weight-only quantization of a bundle's graphs, with the error measured."""
