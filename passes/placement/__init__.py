"""Placement of single operators on unlike devices: for throughput, and for latency."""
