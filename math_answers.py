"""
Are two mathematical answers equal? As the library math-verify finds (github.com/huggingface/Math-Verify), which reads
LaTeX and plain expressions and compares them with SymPy; it is optional.

    equal(r'\\frac{3}{2}', 'So it is $1.5$.')        True

A stranger's text may ask for 9**9**9**9. The library's own time limit is a signal, which reaches the main thread only,
and not while Python multiplies. So the library works in a process of its own, whose watchdog ends it after SECONDS;
the next question starts another one.
"""
import atexit
import contextlib
import faulthandler
import functools
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading

from errors import UserError

PACKAGE = 'math-verify[antlr4_13_2]==0.9.0'
SECONDS = 5  # for one question; most take milliseconds
MEMORY = 4 << 30  # bytes of addresses, where the system can limit them
LONGEST = 20_000  # characters of a text that are read, the last ones
SHORT = 200  # a longer text without markup is no formula

MARKUP = re.compile(r'\$|\\boxed|(?<!\\)\\[(\[]')
BOLD = re.compile(r'(?<!\w)\*\*([^*\n]+)\*\*(?!\w)')
COMMAND = re.compile(r'\\(?:text|mathrm|operatorname|mbox|begin|end)\s*\{[^{}]*\}|\\[a-zA-Z]+')
# Of what is no formula the library would make a product of letters, a quotient, or half of it: words, blanks between
# digits, powers as in Python, '1.234,50', dates, times of day, and characters that it does not know.
SHORT_WORD = r'(?i:(?<![a-z])(?:an|as|at|be|by|he|in|is|it|no|of|on|pi|so|to|we)(?![a-z]))'
SENTENCE = re.compile(rf'{SHORT_WORD}|[A-Za-z]{{3,}}(?:.*?[^A-Za-z][A-Za-z]{{3,}}){{2}}', re.S)  # not '3 square units'
NO_FORMULA = re.compile(rf'[A-Za-z]{{3}}|{SHORT_WORD}' r'|\d(?:\s|\\[,;:! ])+\d|\*\*|\.\d{3},\d|\d{4}-\d\d-\d\d'
                        r'|\d+([/.])\d+\1\d|(?<!\d)\d\d?:\d\d(?!\d)|[^\x00-\x7f]')


class Worker:
    """The process that the library works in, started by the first question."""

    def __init__(self):
        self.process = None
        self.problem = ''
        self.lock = threading.Lock()
        atexit.register(self.stop)

    def ask(self, gold, text, digits):
        """See `answer`, which replies; None if there was no reply in time."""
        with self.lock:
            if self.process is None:
                self.start()
            try:
                self.process.stdin.write(json.dumps([gold, text, digits]) + '\n')
                self.process.stdin.flush()
                reply = self.process.stdout.readline()
            except OSError:
                reply = ''
            if not reply:
                self.stop()
            return json.loads(reply) if reply else None

    def start(self):
        if not self.problem:
            self.spawn()
        if self.problem:
            raise UserError(f"the grader 'math' needs math-verify ({self.problem}): pip install '{PACKAGE}'")

    def spawn(self):
        env = os.environ | {'PYTHONHASHSEED': '0'}  # the same verdict every time
        self.process = subprocess.Popen([sys.executable, __file__, str(SECONDS)], encoding='utf-8', env=env,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.problem = json.loads(self.process.stdout.readline() or '"it did not start"')
        if self.problem:
            self.stop()

    def stop(self):
        if self.process is not None:
            self.process.kill()
            with contextlib.suppress(OSError):  # what could not be written to it
                self.process.communicate()
            self.process = None


WORKER = Worker()


@functools.lru_cache(1 << 16)
def equal(gold, text, digits=6):
    """Whether a text's answer equals gold, decimals up to so many digits after the point; False if that took too long.

    Texts are read as `read` says. UserError if the library is not there.
    """
    return WORKER.ask(gold[-LONGEST:], text[-LONGEST:], digits) is True


@functools.lru_cache(1 << 17)
def readable(gold):
    """Whether gold is read whole, as one formula, in time, and is something that another answer can equal."""
    return len(gold) <= LONGEST and WORKER.ask(gold, None, 6) is True


def read(parse, text):
    """What the library finds in a text -> (its expressions, whether the text is a formula and read whole).

    A text without markup that may be a formula is read as if between dollars. Of any other text it is the library's
    business which part is the answer.
    """
    text = BOLD.sub(r'\1', text.replace('\\$', '')).strip().removesuffix('.')
    marked, found, whole = MARKUP.search(text), [], False
    if marked or len(text) <= SHORT and not SENTENCE.search(COMMAND.sub('#', text)):
        found = parse(text if marked else f'${text}$', parsing_timeout=None)  # [] or [its LaTeX] or [expression, LaTeX]
        whole = len(found) == 2 and not NO_FORMULA.search(COMMAND.sub('#', found[1]))
    if not marked and not whole:
        found = parse(text, parsing_timeout=None)
    return [expression for expression in found if not isinstance(expression, str)], whole


def answer(parse, verify, gold, text, digits):
    """Whether a text's answer equals gold; of a text that is None, whether gold is `readable`."""
    due, whole = read(parse, gold)
    said = read(parse, '0' if text is None else text)[0]
    equals = verify(due, said, float_rounding=digits, timeout_seconds=None)
    return whole and verify(due, due, timeout_seconds=None) if text is None else equals  # 1/0 does not equal itself


def main():
    """The process: a question a line on stdin, a reply a line on stdout; first what keeps it from working, or ''."""
    for name in (signal.SIGINT, signal.SIGTERM):  # the one who asks ends in its own time, and closes stdin
        signal.signal(name, signal.SIG_IGN)
    try:
        from math_verify import parse, verify
        problem = ''
    except ImportError as e:
        problem = str(e)
    print(json.dumps(problem), flush=True)
    logging.disable()
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    nowhere = open(os.devnull, 'w')
    cached = functools.lru_cache(1 << 10)(parse) if not problem else None
    for line in sys.stdin:
        gold, text, digits = json.loads(line)
        faulthandler.dump_traceback_later(float(sys.argv[1]), exit=True, file=nowhere)
        reply = answer(cached, verify, gold, text, digits)
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(bool(reply)), flush=True)


if __name__ == '__main__':
    main()
