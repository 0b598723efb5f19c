"""Learned evaluators: a process reward model here, a judge behind a server."""
