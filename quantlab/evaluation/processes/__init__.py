"""The measuring processes: worker, its client, their messages, and the sequence of cells of one artifact."""
