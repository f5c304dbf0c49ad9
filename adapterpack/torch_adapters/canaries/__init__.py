"""Records canaries (a few inputs with their logits) of adapters in torch models, and replays them to check
that an attached pack behaves as when it was made.
"""
