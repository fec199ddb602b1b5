"""What the package costs and reaches: each script prints a table, writes it with a page, and names the machine."""
