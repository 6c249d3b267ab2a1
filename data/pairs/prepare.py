"""
Graded answers of a model itself -> pairs, one right and one wrong, in ../NAME/prefs_train.jsonl and prefs_val.jsonl.

The input is what sft.py's --eval_file holds of several answers to each prompt: JSON lines with the `messages` of a row,
its `answer`, the `text` of an answer and whether it is `correct`. A reward model, or DPO, then learns where this model
errs, instead of what somebody thought that models do wrong. A prompt lies in one split.

    python sft.py --init_from=out/sft --dataset=wordproblems --eval_only=True --eval_split=train --eval_rows=6000 \\
        --eval_samples=8 --eval_temperature=1 --eval_file=out/answers.jsonl
    python data/pairs/prepare.py --input=out/answers.jsonl --name=own_pairs
"""
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import runtime

from preparation import folder_for, write_rows
from rows import fraction_of
from tokenizer import UserError

input = ''  # a file of graded answers
name = 'own_pairs'  # the dataset is written to data/NAME/
per_prompt = 4  # pairs of a prompt at most, each with other answers
val_fraction = 0.05  # share of the prompts that is held out
seed = 1337  # decides the pairs and the split


def graded(path):
    """{prompt as JSON: (row, right answers, wrong answers)} of a file, each answer once."""
    found = {}
    try:
        lines = path.read_text(encoding='utf-8').split('\n')  # JSON may hold what `splitlines` takes for an end
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{path}: {error}: give a file of graded answers with --input (sft.py --eval_file)') from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, text, right = row['messages'][:-1], row['text'], bool(row['correct'])
            empty = not text.strip()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f'{path}, line {number}: no graded answer ({type(error).__name__}: {error}): it needs '
                            '"messages", "text" and "correct"') from None
        of = found.setdefault(json.dumps(prompt), (row, {}, {}))
        if not empty:
            of[1 if right else 2][text] = None
    return found


def main():
    runtime.configure(globals())
    if not 0 < val_fraction < 1 or per_prompt < 1:
        raise UserError(f'val_fraction={val_fraction}, per_prompt={per_prompt}: a share below 1, and at least one pair')
    found = graded(Path(input))
    splits = {'prefs_train': [], 'prefs_val': []}
    for prompt, (row, *answers) in found.items():
        draw = random.Random(f'{seed} {prompt}')
        chosen, rejected = (draw.sample([*of], len(of)) for of in answers)
        split = 'prefs_val' if fraction_of(f'{seed} {prompt}') < val_fraction else 'prefs_train'
        for pair in list(zip(chosen, rejected, strict=False))[:per_prompt]:
            kept = {key: row[key] for key in ('answer', 'grader', 'steps', 'kind') if row.get(key) is not None}
            splits[split].append({'prompt': row['messages'][:-1], 'chosen': pair[0], 'rejected': pair[1]} | kept)
    if not all(splits.values()):
        raise UserError(f'{input}: no prompt of the {"held-out part" if splits["prefs_train"] else "rows"} has a right '
                        'and a wrong answer: give more prompts, or more answers to each')
    random.Random(seed).shuffle(splits['prefs_train'])
    write_rows(folder_for(__file__, name), splits, f'{input}, per_prompt={per_prompt}, val_fraction={val_fraction}, '
                                                   f'seed={seed}')


if __name__ == '__main__':
    runtime.cli(main)
