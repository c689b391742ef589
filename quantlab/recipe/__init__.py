"""The recipe: its schema, the algorithms and their options, the table of schemes. Needs no torch."""
