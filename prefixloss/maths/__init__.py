"""The formulas, once: objectives, softmax rows, metrics, precision."""
