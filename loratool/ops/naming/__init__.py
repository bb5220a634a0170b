"""From the spelling of a file to dotted module paths, and never by guessing."""
