"""The schemes of quantized graphs, one file a scheme or a family."""
