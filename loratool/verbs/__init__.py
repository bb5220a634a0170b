"""The verbs: each plans from headers, then one shared loop moves the data."""
