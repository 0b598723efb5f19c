"""backend="torch": plain torch, in chunks, on any device and over several processes."""
