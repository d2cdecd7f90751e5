"""Triton device functions and small helpers that several ops share."""
