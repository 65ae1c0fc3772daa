"""Benchmarks of this project's speed: a short script for each kind of work."""
