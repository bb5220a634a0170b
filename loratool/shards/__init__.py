"""A job in parts that may be done in any order, anywhere, and more than once."""
