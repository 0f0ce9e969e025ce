"""How fast the cache is beside the bare model, and beside a bare read."""
