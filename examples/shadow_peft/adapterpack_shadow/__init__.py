"""ShadowPEFT for adapterpack, as a package of its own: a method, and the kind of adapter that it needs."""
