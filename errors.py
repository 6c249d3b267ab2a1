"""The one exception that the programs here show without a traceback, and what others say."""


class UserError(ValueError):
    """A mistake that the person at the keyboard can mend: one line that names what is wrong and the remedy."""


def one_line(error):
    """What an exception says, as one line that is not too long."""
    return ' '.join(f'{error}'.split())[:300]
