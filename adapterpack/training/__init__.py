"""The training core: sites, injection, data, tasks, and the glue to ``transformers.Trainer``; needs torch."""
