"""The one exception that the programs here show without a traceback."""


class UserError(ValueError):
    """A mistake that the person at the keyboard can mend: one line that names what is wrong and the remedy."""
