"""
Words of random letters and the same words reversed -> train.jsonl and val.jsonl here.

The smallest task that needs an encoder, a decoder and what connects them: the first letter of the answer is the last of
the source. No word is drawn twice, so none of the held-out ones is in the training part.

    python data/reverse/prepare.py
    python data/reverse/prepare.py --train_pairs=1000 --max_length=8 --seed=2
"""
import random
import string
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import runtime

from preparation import write_rows
from tokenizer import UserError, get_tokenizer

train_pairs = 50_000  # to learn from
val_pairs = 2_000  # held out
min_length = 4  # letters of the shortest words
max_length = 16  # of the longest; every length is as likely
letters = 26  # size of the alphabet: a, b, c …
seed = 1337  # decides the words


def main():
    runtime.configure(globals())
    alphabet, count = string.ascii_lowercase[:letters], train_pairs + val_pairs
    if min(train_pairs, val_pairs) < 1 or not 1 <= letters <= 26 or not 1 <= min_length <= max_length:
        raise UserError('train_pairs, val_pairs and min_length start at 1, letters lie between 1 and 26, and '
                        'max_length is not below min_length')
    if 2 * count > sum(letters ** n for n in range(min_length, max_length + 1)):
        raise UserError(f'{count:,} different words of {min_length} to {max_length} letters out of {letters}: '
                        'there are too few of them: raise max_length or letters')
    draw, words = random.Random(seed), {}
    while len(words) < count:
        words[''.join(draw.choices(alphabet, k=draw.randint(min_length, max_length)))] = None
    pairs = [{'source': word, 'target': word[::-1]} for word in words]
    write_rows(Path(__file__).parent, {'train': pairs[:train_pairs], 'val': pairs[train_pairs:]},
               f'words of {min_length} to {max_length} random letters out of {letters}, seed {seed}',
               get_tokenizer('chars', [alphabet]))


if __name__ == '__main__':
    runtime.cli(main)
