"""What an output tensor is made of: expressions over stored tensors, decided from headers."""
