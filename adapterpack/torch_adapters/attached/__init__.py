"""Works on adapters that are already attached to a model: merges, unmerges, weighs, lists and swaps them."""
