"""How a merge is decided: which tensor of the base each tensor of an adapter changes, and how."""
