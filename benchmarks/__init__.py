"""Benchmarks of Alrao: networks, data sets, the training loop, and its commands."""
