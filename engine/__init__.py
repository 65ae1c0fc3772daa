"""A run: its settings, what it trains with, its files, its TensorBoard events."""
