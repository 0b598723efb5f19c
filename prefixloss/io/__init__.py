"""What leaves the package: files written whole, text that is safe to show."""
