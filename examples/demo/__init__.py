"""The stages that ``adapterpack demo`` runs: ``encoder`` or, with ``--causal-lm``, ``causal_lm``."""
