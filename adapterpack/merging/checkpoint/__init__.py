"""The merge of a checkpoint: what is planned, laid out, computed by a few workers, recorded and reported."""
