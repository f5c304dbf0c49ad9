"""The artifact: manifest, strict safetensors, digests, base fingerprint, PEFT layout. No torch, no
transformers.
"""
