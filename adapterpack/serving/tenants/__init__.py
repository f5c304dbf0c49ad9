"""Who asks a server: keys, what each may use, and the limits of all."""
