"""What engines refuse or misread, as data: rules read from their sources, by engine and version."""
