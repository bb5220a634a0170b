"""Arithmetic on arrays of any library: low-rank matrices, what they lose, what they share."""
