"""What people see of a report, as plain data, and how it is shown: terminal, pipe, notebook."""
