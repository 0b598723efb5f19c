"""A call's arguments, checked, as one flat batch of tokens."""
