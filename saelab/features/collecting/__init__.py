"""One pass over text that gathers statistics and examples of every feature, and the files of the store that it fills."""
