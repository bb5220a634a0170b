"""What several schemes have in common, each part in a module of its own."""
