"""What is told of adapters and models, as people see it."""
