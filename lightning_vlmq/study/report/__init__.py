"""The report of a study: a page, its tables and figures."""
