"""Puzzles with rules: a solution is replayed move by move, or proved line by line."""
