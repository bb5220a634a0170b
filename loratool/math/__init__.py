"""Torch arithmetic: what each kind of delta is, and how it changes a weight."""
