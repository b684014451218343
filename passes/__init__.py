"""Decide: each module takes a plan and returns it with one more decision made."""
