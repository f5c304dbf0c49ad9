"""Changes to an exported graph: slots, adapter nodes, packed projections, the static cache."""
