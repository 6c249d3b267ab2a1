"""
GSM8K, 8,792 word problems of grade school with worked solutions (arXiv:2110.14168) -> {train,val,test}.jsonl here.

Rows are those of data/wordproblems: the solution without its calculator marks, inside <think> and </think>, then "The
answer is 42."; `answer` is the gold number. Test is the published one; val is 5 % of the published training rows, by a
hash of the question.

    python data/gsm8k/prepare.py
    python data/gsm8k/prepare.py --input=FOLDER_WITH_TRAIN_AND_TEST_JSONL
    python data/gsm8k/prepare.py --tools=True                   into ../gsm8k_tools

With tools a mark becomes a call: `48/2 = <<48/2=24>>24` is `48/2 = <tool>48/2</tool>[24]` there. A mark whose result,
or the number that the text goes on with, is not what the calculator says is left out as without tools, and counted.
"""
import json
import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import runtime

from grade import UNSIGNED, last_number
from preparation import check_sha256, fetch_url, folder_for, write_rows
from rows import fraction_of
from tokenizer import UserError, calculate

input = ''  # a folder with train.jsonl and test.jsonl; empty: fetch them to source_{train,test}.jsonl here
tools = False  # the solutions call the calculator; this writes to another folder
name = ''  # the dataset is written to data/NAME/; empty: gsm8k, or gsm8k_tools

URL = 'https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data'
SHA256 = {'train': '17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465',
          'test': '3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14'}
VAL_FRACTION = 0.05
MARK = re.compile(rf'<<(.*?)>>(-?(?:{UNSIGNED}))?')  # and the number that the text goes on with


def with_calls(text, counts):
    """A solution whose marks are calls of the calculator; counts, of a Counter: 'calls', and 'left out', the others."""
    def call(mark):
        expr, _, marked = mark[1].rpartition('=')
        result = calculate(expr)
        same = result != 'error' and last_number(result) == last_number(marked) == last_number(mark[2] or '')
        counts['calls' if same else 'left out'] += 1
        return f'<tool>{expr}</tool>[{result}]' if same else mark[2] or ''
    return MARK.sub(call, text)


def read_rows(path, counts=None):
    """Yields a row for every line of a published file; UserError names the line that is none. counts: see `with_calls`,
    None for no calls."""
    with open(path, 'rb') as f:
        for number, line in enumerate(f, 1):
            try:
                row = json.loads(line)
                question, solution = row['question'].strip(), row['answer']
                steps, gold = re.fullmatch(r'(.+)\n#### (-?[\d,]*\d)\s*', solution, re.S).groups()
            except (ValueError, KeyError, TypeError, AttributeError) as e:
                raise UserError(f'{path}, line {number}: not a JSON object with a "question" and an "answer" that ends '
                                f'in "#### NUMBER" ({type(e).__name__}: {e})') from e
            steps = re.sub('<<.*?>>', '', steps) if counts is None else with_calls(steps, counts)
            steps = [line for line in steps.split('\n') if line.strip()]
            gold = gold.replace(',', '')
            content = '<think>' + '\n'.join(steps) + f'</think>\nThe answer is {gold}.'
            yield {'messages': [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': content}],
                   'answer': gold, 'grader': 'number', 'steps': len(steps)}


def find_source(split):
    """The published file of a split, fetched if need be and checked."""
    path = Path(input) / f'{split}.jsonl' if input else Path(__file__).parent / f'source_{split}.jsonl'
    if not input and not path.exists():
        fetch_url(f'{URL}/{split}.jsonl', path, sha256=SHA256[split])
    if not path.is_file():
        raise UserError(f'{path}: no such file: give the folder of train.jsonl and test.jsonl from {URL} or no --input')
    check_sha256(path, SHA256[split])
    return path


def main():
    runtime.configure(globals())
    folder, counts = folder_for(__file__, name, 'tools' if tools else ''), Counter() if tools else None
    train, test = (list(read_rows(find_source(split), counts)) for split in ('train', 'test'))
    val = [row for row in train if fraction_of(row['messages'][0]['content']) < VAL_FRACTION]
    train = [row for row in train if fraction_of(row['messages'][0]['content']) >= VAL_FRACTION]
    write_rows(folder, {'train': train, 'val': val, 'test': test},
               f'{URL}/{{train,test}}.jsonl (sha256 {SHA256["train"]}, {SHA256["test"]})'
               + ', with tools' * tools)
    if tools:
        print(f'{counts["calls"]:,} calls of the calculator; {counts["left out"]:,} marks left out, of other results')


if __name__ == '__main__':
    runtime.cli(main)
