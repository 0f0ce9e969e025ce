"""One experiment a file; see `saelab.claims.registry`."""
