"""Translate: a model into a graph, a plan into programs, and both into files and back."""
