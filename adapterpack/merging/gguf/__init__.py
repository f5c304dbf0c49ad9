"""Folds into models of llama.cpp: GGUF files, each tensor written again in its own type."""
