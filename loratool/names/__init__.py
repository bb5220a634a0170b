"""How the modules of each model family are named in the conventions that occur."""
