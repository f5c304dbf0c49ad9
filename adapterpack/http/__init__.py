"""What the servers of this package have in common: connections with deadlines, bodies with bounds, refusals. Needs the extra ``serve``."""
