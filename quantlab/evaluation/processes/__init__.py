"""The processes that measure: the messages between them, their workers, and the cells of one artifact in order."""
