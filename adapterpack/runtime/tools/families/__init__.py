"""The notations of tool calls; each module registers one family of models."""
