"""What people see of a report: facts, tables and notes as plain data, on a terminal or a page."""
