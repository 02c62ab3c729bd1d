"""The one error type of this folder: its text is the sentence that the user reads."""


class VideoError(ValueError):
    """A video cannot be read or written; the message is one sentence with the input or file and what to do."""
