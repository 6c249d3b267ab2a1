"""
Sums and differences of numbers of two digits, in words: prompts whose answers a program can check.

    python data/arithmetic/prepare.py
    python data/arithmetic/prepare.py --train_rows=9000

A row is a chat with four solved examples and a question, and its result: {"prompt": […], "answer": "81", "grader":
"number", "kind": "plus"}. No pair of numbers of val or test is in train.
"""
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import runtime

from preparation import write_rows
from tokenizer import UserError

train_rows = 4_000  # to learn from
held_rows = 500  # each for val and test
seed = 1337  # decides which are held out, and the order

ONES = ('zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen '
        'seventeen eighteen nineteen').split()
TENS = 'twenty thirty forty fifty sixty seventy eighty ninety'.split()
SIGNS = {'plus': '+', 'minus': '-'}
EXAMPLES = ((52, 'plus', 31), (64, 'minus', 20), (17, 'plus', 45), (90, 'minus', 37))


def format_metrics(n):
    """0 … 99 in English: 42 -> 'forty-two'."""
    if n < 20:
        return ONES[n]
    return TENS[n // 10 - 2] + (f'-{ONES[n % 10]}' if n % 10 else '')


def result(a, sign, b):
    return a + b if sign == 'plus' else a - b


def question(a, sign, b):
    return {'role': 'user', 'content': f'What is {format_metrics(a)} {sign} {format_metrics(b)}?'}


def row(a, sign, b):
    """A prompt with its answer."""
    prompt = []
    for example in EXAMPLES:
        x, how, y = example
        solved = f'{x} {SIGNS[how]} {y} = {result(*example)}'
        prompt += [question(*example), {'role': 'assistant', 'content': solved}]
    return {'prompt': [*prompt, question(a, sign, b)], 'answer': str(result(a, sign, b)), 'grader': 'number',
            'kind': sign}


def problems():
    """All of two digits with a result of at least 0, but for the examples, in an order that the seed decides."""
    every = [(a, sign, b) for a in range(10, 100) for b in range(10, 100) for sign in SIGNS
             if result(a, sign, b) >= 0 and (a, sign, b) not in EXAMPLES]
    random.Random(seed).shuffle(every)
    return every


def main():
    runtime.configure(globals())
    every = problems()
    if not 1 <= held_rows <= len(every) // 4:
        raise UserError(f'held_rows={held_rows}: take 1 to {len(every) // 4:,}')
    splits = {'val': every[:held_rows], 'test': every[held_rows:2 * held_rows]}
    seen = {frozenset((a, b)) for a, _, b in every[:2 * held_rows]}
    rest = [(a, sign, b) for a, sign, b in every[2 * held_rows:] if frozenset((a, b)) not in seen]
    if not 1 <= train_rows <= len(rest):
        raise UserError(f'train_rows={train_rows}: there are 1 to {len(rest):,} problems of other numbers')
    splits = {'train': rest[:train_rows]} | splits
    write_rows(Path(__file__).parent, {split: [row(*problem) for problem in of] for split, of in splits.items()},
               f'sums and differences of two digits in words, seed {seed}')


if __name__ == '__main__':
    runtime.cli(main)
