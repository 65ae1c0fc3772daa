"""The report: a page and its figures, read from what an evaluation says."""
