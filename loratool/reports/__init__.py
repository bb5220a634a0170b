"""Pictures and pages of what the verbs found."""
