"""What a key may see of a server: its own traffic, and the adapters that it may name; an operator's key sees
all.
"""
