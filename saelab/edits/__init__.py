"""Model edits: what features and directions build for `lm.steer`."""
