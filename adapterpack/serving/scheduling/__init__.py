"""From requests to rows of the engine: preparation, admission, order, and the one thread that steps."""
