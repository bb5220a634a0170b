"""Plug-ins of no real model, one file of each kind, as somebody would add them."""
