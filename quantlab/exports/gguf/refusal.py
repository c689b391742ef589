"""Why an artifact cannot be written as GGUF."""


class RefusalError(Exception):
    """llama.cpp could not load the file, or would compute another model with it.

    Args:
        reason: what it cannot do and what was found, in one sentence.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
