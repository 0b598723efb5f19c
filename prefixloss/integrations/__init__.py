"""prefixloss inside other trainers: one module for each, imported only when asked for."""
