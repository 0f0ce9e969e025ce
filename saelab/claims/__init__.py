"""The papers' claims, tested: `registry` finds the experiments, `runs` runs them, `page` is the table they make."""
