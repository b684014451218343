"""Tests of the values that pass between the parts of the compiler."""
