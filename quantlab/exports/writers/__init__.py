"""One module per format that an artifact is written in."""
