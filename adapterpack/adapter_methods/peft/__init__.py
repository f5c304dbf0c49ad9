"""How PEFT stores a method: tensor names, config keys, and the conversions where its files differ from a
pack.
"""
