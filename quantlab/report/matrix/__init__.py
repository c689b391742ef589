"""The matrix of one recipe: its columns, rows and plots, as a page, Markdown, CSV, terminal table and model cards."""
