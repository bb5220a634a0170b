"""What ``compare`` is made of: one module, many adapters, the layers of one, what people see."""
