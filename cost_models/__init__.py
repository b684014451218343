"""Predict: seconds and bytes of a graph, a plan or a program on a cluster."""
