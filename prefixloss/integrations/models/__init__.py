"""What a model is to this package: its head, its positions, and whether a patch of it computes the same."""
