"""The schemes of quantized graphs, one module for each scheme or family."""
