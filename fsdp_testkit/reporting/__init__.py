"""Consumers of result rows: the text of a failure, the matrix in the terminal, the JSON report."""
