"""The checks behind ``validate``, by what they look at."""
