"""From an adapter of expressions to output files: the stages that every scheme shares."""
