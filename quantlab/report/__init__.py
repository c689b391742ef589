"""Tables, plots and pages from records alone: one folder per kind of page. Needs no torch."""
