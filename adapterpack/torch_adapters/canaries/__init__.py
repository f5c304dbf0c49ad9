"""Canaries of adapters in torch models: recorded when a pack is made, replayed when it is attached."""
