"""What a server measures and logs: metrics, audit log, traces, and the traffic of each key."""
