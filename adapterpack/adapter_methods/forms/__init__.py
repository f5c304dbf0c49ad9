"""The normal forms of adapters that do not change a weight: prompts, blocks, attention, routers."""
