"""The one view of a model: its modules, and where each one's weight lies in its files."""
