"""What a server counts and writes down: metrics, audit log, traces, traffic."""
