"""What will be written, as a value, and the one loop that carries it out."""
