"""Text of requests: tokenizers, chat templates, context lengths, and streaming detokenization."""
