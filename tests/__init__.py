"""Tests of cutset; the folders mirror the source."""
