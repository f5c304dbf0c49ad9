"""Base + packs -> bundle: frontends, site map, emitter, parity."""
