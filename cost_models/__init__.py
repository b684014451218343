"""Predictions: what ops, links, memory, the optimizer and whole programs will cost."""
