"""
How far something is that takes long: one line, rewritten on a terminal.

    for row in counted(rows, 'tokenising', 'rows'):
        …
    progress = Progress(f'fetching {url}', 'MB', total=size)
    progress(done)                                          when so many bytes are there
"""
import contextlib
import os
import shutil
import sys
import time

PAUSES = {True: 2, False: 20}  # seconds between two lines, on a terminal and elsewhere


class Progress:
    """Shows how much is done: two seconds after the beginning on a terminal, twenty elsewhere, and as often again.

    total: how much there is, None = nobody knows. unit: 'MB' for what is counted in bytes. stream: None = standard
    output. show: what a line is given to instead of the stream.
    """

    def __init__(self, what, unit, total=None, stream=None, show=None):
        self.what, self.unit, self.total, self.done = what, unit, total, 0
        self.stream = stream or sys.stdout
        self.show = show or self.write
        self.written = False  # a line of ours is on the terminal
        self.began = self.last = time.monotonic()

    def __call__(self, done):
        """So much is done."""
        self.done = done
        now = time.monotonic()
        if now - self.last >= PAUSES[self.stream.isatty()]:
            self.last = now
            self.show(self.text(now - self.began))

    def text(self, seconds):
        """How far it is after so many seconds."""
        def number(n):
            return f'{n / 1e6:,.1f}' if self.unit == 'MB' else f'{n:,}'
        of = f' of {number(self.total)}' if self.total else ''
        text = f'{self.what}: {number(self.done)}{of} {self.unit}'
        if self.unit == 'MB':
            text += f', {number(self.done / seconds)} MB/s'
        if self.total and self.done:
            text += f', {max(0, self.total - self.done) * seconds / self.done:.0f} s left'
        return text

    def write(self, line):
        if os.environ.get('RANK', '0') == '0':  # under torchrun one process speaks
            self.written = self.stream.isatty()
            with contextlib.suppress(OSError):  # a terminal that is gone must not end the work
                print(on_line(line) if self.written else line, end='' if self.written else '\n', file=self.stream,
                      flush=True)

    def end(self, text=''):
        """It is done: the line goes from the terminal, and a text takes its place."""
        if self.written:
            print(on_line(''), end='\r', file=self.stream, flush=True)
        if text:
            print(f'{self.what}: {text}', file=self.stream, flush=True)


def on_line(text):
    """A text in the place of the terminal's last line."""
    width = shutil.get_terminal_size().columns - 1
    return f'\r{text[:width]:<{width}}'


def counted(items, what, unit, **where):
    """Yields items, with a Progress."""
    progress = Progress(what, unit, len(items) if hasattr(items, '__len__') else None, **where)
    try:
        for done, item in enumerate(items):
            progress(done)
            yield item
    finally:
        progress.end()
