"""Text of requests: tokenizers, chat templates, and what a generated row may say so far."""
