"""Many commands, recorded commands, and commands in parts."""
