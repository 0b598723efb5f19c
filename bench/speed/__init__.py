"""Time, memory and error of the loss beside other methods, from one run."""
