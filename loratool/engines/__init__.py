"""Where calls are carried out: processes here, or a cluster that is there; and what gets lost."""
