"""The work of ``convert``: any scheme to modules and values, and those to any scheme."""
