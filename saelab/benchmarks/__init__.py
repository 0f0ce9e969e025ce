"""What the variants do side by side: on data whose features are known, and on a model's activations."""
