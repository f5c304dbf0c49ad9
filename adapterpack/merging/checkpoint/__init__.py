"""The merge of a checkpoint in stages: plan, layout, jobs on a few workers, journal and report."""
