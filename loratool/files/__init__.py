"""Bytes, headers, containers, checkpoints, and outputs that appear whole or not at all."""
