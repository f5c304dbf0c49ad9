"""Where models and packs come from: folders, hub ids, ``hf://`` references."""
