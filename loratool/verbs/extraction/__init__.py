"""How ``extract`` pairs two checkpoints, computes modules and writes the result."""
