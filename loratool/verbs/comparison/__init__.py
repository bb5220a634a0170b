"""What comparisons found, as people see it."""
