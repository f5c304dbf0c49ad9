"""The pack format: manifest, strict safetensors, digests, base fingerprint and PEFT's layout. Needs neither
torch nor transformers.
"""
