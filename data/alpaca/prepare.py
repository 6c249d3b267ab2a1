"""
Instructions as in Alpaca -> ../NAME/train.jsonl, val.jsonl and, if asked for, test.jsonl; of rows that have them, pairs
of answers -> prefs_train.jsonl and so on.

The input is a JSON list or JSONL of {"instruction": …, "input": …, "output": …}, perhaps with "chosen" and "rejected";
"input" may be empty or missing, keys that decide nothing are left out. The user says the instruction and, after a
blank line, the input; the assistant answers the output, or of a pair either. A prompt lies in one split, whatever its
order and however often it comes; a row that is there twice is taken once, and a pair of equal answers is none.

    python data/alpaca/prepare.py
    python data/alpaca/prepare.py --input=instructions.json --name=mine --test_fraction=0.1
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import runtime

from preparation import fetch_url, folder_for, write_rows
from rows import IDLE, REFUSED, SKIP, THOUGHTS, fraction_of
from tokenizer import UserError

input = ''  # a .json or .jsonl file; empty: fetch Stanford's 52,002 rows to alpaca_data.json here
name = 'alpaca'  # the dataset is written to data/NAME/
val_fraction = 0.1  # share of the prompts for validation
test_fraction = 0.0  # share of the prompts for a test split
strict = True  # stop at a malformed row of the input; False: leave such rows out, as those of the fetched file are
seed = 1337  # decides the splits

URL = 'https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json'
ROWS = 52_002  # in that file


def read_items(path):
    """[(where, text of a JSON object or what was one)] of a file; UserError if it is neither a JSON list nor JSONL."""
    try:
        text = path.read_text(encoding='utf-8-sig')
    except UnicodeDecodeError as e:
        raise UserError(f'{path}: byte {e.start} is not UTF-8: convert the file to UTF-8') from None
    if not text.lstrip().startswith('['):
        return [(f'{path}, line {i}', line) for i, line in enumerate(text.split('\n'), 1) if line.strip()]
    try:
        return [(f'{path}, row {i}', json.dumps(item)) for i, item in enumerate(json.loads(text), 1)]
    except ValueError as e:
        raise UserError(f'{path}: not a list in JSON ({e})') from e


def to_row(text):
    """A JSON object as a chat, and what it has of a preference; ValueError says what is wrong with it."""
    item = json.loads(text)
    if not isinstance(item, dict):
        raise ValueError('not a JSON object')
    for key in ('system', 'history', 'tools', *THOUGHTS, *REFUSED, 'label', 'kto_tag'):
        if item.get(key) not in (None, True, *IDLE) or key in ('label', 'kto_tag') and item.get(key) is False:
            raise ValueError(f'"{key}" is not read here: sft.py and dpo.py read such a file themselves '
                             '(--dataset=FILE)')
    parts, pair = [], [key for key in ('chosen', 'rejected') if key in item]
    for key in ('instruction', 'input', 'output', *pair):
        part = item.get(key, '' if key == 'input' else None)
        if not isinstance(part, str) or not part.strip() and key != 'input':
            raise ValueError(f'"{key}" must be a text' + ' that is not empty' * (key != 'input'))
        part.encode()
        parts.append(part.strip())
    prompt = '\n\n'.join(part for part in parts[:2] if part)
    answers = [[{'role': 'assistant', 'content': text}] for text in parts[2:]]
    prompt = [{'role': 'user', 'content': prompt}]
    return {'messages': prompt + answers[0]}, {'prompt': prompt} | dict(zip(pair, answers[1:], strict=True))


def find_items():
    """The file to read, fetched if need be, and what `read_items` reads there."""
    path = Path(input) if input else Path(__file__).resolve().parent / 'alpaca_data.json'
    if not input and not path.exists():
        fetch_url(URL, path)
    if not path.is_file():
        raise UserError(f'{path}: no such file: give {URL} or a file like it, or no --input')
    items = read_items(path)
    if not input and len(items) != ROWS:
        raise UserError(f'{path}: {len(items):,} rows, not {ROWS:,}: it is another file or damaged; fetch it again')
    return path, items


def main():
    runtime.configure(globals())
    folder = folder_for(__file__, name)
    if val_fraction <= 0 or test_fraction < 0 or val_fraction + test_fraction >= 1:
        raise UserError(f'val_fraction={val_fraction}, test_fraction={test_fraction}: give shares that leave some rows '
                        'for training, and some for validation')
    path, items = find_items()
    rows, prefs, equal, skipped = {}, {}, 0, []
    for where, text in items:
        try:
            row, pref = to_row(text)
            rows[json.dumps(row)] = row
            if len(pref) == 3 and pref['chosen'] == pref['rejected']:
                equal += 1
            elif len(pref) == 3:
                prefs[json.dumps(pref)] = pref
        except ValueError as e:
            if strict and input:
                raise UserError(f'{where}: {e}; {SKIP}') from e
            skipped.append(f'{where}: {e}')
    names = ['train', 'val', *['test'] * bool(test_fraction)]
    splits = {name: [] for name in names} | ({f'prefs_{name}': [] for name in names} if prefs else {})
    for row in (*rows.values(), *prefs.values()):
        place = fraction_of(f'{seed} {(row.get("messages") or row["prompt"])[0]["content"]}')
        split = 'val' if place < val_fraction else 'test' if place < val_fraction + test_fraction else 'train'
        splits['prefs_' * ('prompt' in row) + split].append(row)
    shares = f'val_fraction={val_fraction}, test_fraction={test_fraction}, seed={seed}'
    write_rows(folder, splits, f'{input or URL}, {shares}')
    if skipped:
        print(f'{path}: {len(skipped):,} malformed rows were left out; the first: {" / ".join(skipped[:3])}')
    if equal:
        print(f'{path}: {equal:,} pairs of equal answers were left out')
    if again := len(items) - len(rows) - len(skipped):
        print(f'{path}: {again:,} rows were there before and left out')


if __name__ == '__main__':
    runtime.cli(main)
