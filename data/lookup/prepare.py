"""
Questions of a shop that need two tools, a table of prices and a calculator -> train.jsonl, val.jsonl, test.jsonl and
unseen.jsonl here. A row:

    {"messages": [{"role": "user", "content": "Mia buys 4 pears and 3 figs. How many dollars does she pay in all?"},
                  {"role": "assistant", "content": "", "tool_calls": [lookup("pear"), lookup("fig")]},
                  {"role": "tool", "content": "17"}, {"role": "tool", "content": "23"},
                  {"role": "assistant", "content": "", "tool_calls": [calculate("4 * 17 + 3 * 23")]},
                  {"role": "tool", "content": "137"},
                  {"role": "assistant", "content": "Mia pays 137 dollars."}],
     "table": {"fig": 23, "pear": 17, …}, "answer": "137", "grader": "number", "steps": 3, "kind": "two"}

`lookup` of shop.py reads the row's "table", which the model does not see: prices are drawn anew for every row, so that
nobody can know an answer without it. In some rows of train only `lookup` may be called ("tools" lists it), and the last
turn works the result out itself: a model that is later given no calculator is not at a loss.

What training never sees: in val and test, the persons and what is to be calculated, which is something else in val
than in test; in unseen, the items and the templates too. Choose by val, report test.

    python data/lookup/prepare.py
    python sft.py config/sft_lookup.py        of which --tools=data/lookup/shop.py is a part
"""
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import runtime

from data.wordproblems.prepare import (
    HELD_NAMES,
    LEARNED_NAMES,
    PERSONS,
    POOLS,
    PRONOUNS,
    STEP,
    fill,
    split_of,
)
from preparation import folder_for, write_rows
from tokenizer import UserError, calculate
from tools import load_tools

name = ''  # the dataset is written to data/NAME/; empty: lookup
train_rows = 20_000  # to learn from
val_rows = 1_000  # with persons and numbers held out, to choose by
test_rows = 1_000  # with persons and other numbers held out, to report
unseen_rows = 500  # with items and templates held out, too
alone_share = 0.3  # share of the rows of train that may call lookup alone and calculate without a tool
max_price = 40  # dollars that an item costs at most
table_size = 6  # items that a shop has
seed = 1337  # decides the questions

ITEMS = POOLS['fruit'] + POOLS['treat']
HELD_ITEMS = ITEMS[5::6]
LEARNED_ITEMS = [item for item in ITEMS if item not in HELD_ITEMS]

# kind, whether it is for unseen alone, the question, what to calculate, the same in steps, the answer. {p} and {q} are
# the prices of {thing} and {thing2}; see TEMPLATES in data/wordproblems/prepare.py for the rest
TEMPLATES = [
    ('one', False, '[How many dollars do {a thing} cost?|What is the price of {a thing}, in dollars?]', '{a} * {p}',
     's = a * p', '{a thing} cost {s dollar}.'),
    ('one', False, '{A} buys {a thing}. How many dollars does {he} pay?', '{a} * {p}', 's = a * p',
     '{A} pays {s dollar}.'),
    ('two', False, '{A} buys {a thing} and {b thing2}. How many dollars does {he} pay {altogether}?',
     '{a} * {p} + {b} * {q}', 's = a * p; t = b * q; u = s + t', '{A} pays {u dollar}.'),
    ('two', False, '[How many dollars do {a thing} and {b thing2} cost {altogether}?|'
                   'I want {a thing} and {b thing2}. How many dollars is that?]',
     '{a} * {p} + {b} * {q}', 's = a * p; t = b * q; u = s + t', 'That is {u dollar}.'),
    ('more', False, '{A} buys {a thing} and {an thing2}. How many dollars does {he} pay {altogether}?',
     '{a} * {p} + {q}', 's = a * p; t = s + q', '{A} pays {t dollar}.'),
    ('change', False, '{A} has {c dollar} and buys {a thing}. How many dollars [are left|does {he} have left]?',
     '{c} - {a} * {p}', 's = a * p; t = c - s', '{A} has {t dollar} left.'),
    ('difference', True, 'How many dollars more do {a thing} cost than {an thing2}?', '{a} * {p} - {q}',
     's = a * p; t = s - q', '{a thing} cost {t dollar} more.'),
    ('shared', True, '{A} and {B} buy {a thing} and {b thing2} together, and {he} gives {c dollar}. How many dollars '
                     'does {B} give?',
     '{a} * {p} + {b} * {q} - {c}', 's = a * p; t = b * q; u = s + t; v = u - c', '{B} gives {v dollar}.'),
]


def draw_values(question, expression, plan, split, draw):
    """Numbers of the split that make sense, their prices and all results: {'a': 4, 'p': 17, 's': 68, …}."""
    for _ in range(1000):
        numbers = {'a': draw.randint(2, 12), 'b': draw.randint(2, 12), 'c': draw.randint(20, 300)}
        values = numbers | {'p': draw.randint(2, max_price), 'q': draw.randint(2, max_price)}
        for step in plan.split('; '):
            result, _, x, op, y, _ = STEP.fullmatch(step).groups()
            values[result] = int(calculate(f'{values[x]} {op} {values[y]}'))
        fits = min(values.values()) > 0 and calculate(expression.format(**values)) == str(values[result])
        if fits and split in ('unseen', split_of(expression.format(**values))):
            return values
    raise UserError(f'max_price={max_price}: no numbers for "{question}": raise it')


def draw_row(template, split, draw, tools):
    kind, _, question, expression, plan, result = template
    values = draw_values(question, expression, plan, split, draw)
    names = LEARNED_NAMES if split == 'train' else HELD_NAMES
    items = HELD_ITEMS if split == 'unseen' else LEARNED_ITEMS
    scene = dict(zip('AB', draw.sample(names, 2), strict=True)) | values
    scene |= PRONOUNS[PERSONS[scene['A']]]
    asked = draw.sample(items, table_size)
    scene |= {'thing': asked[0], 'thing2': asked[1]}
    table = {item: draw.randint(2, max_price) for item in asked} | {asked[0]: values['p'], asked[1]: values['q']}
    lines = []
    for step in plan.split('; '):
        to, _, x, op, y, _ = STEP.fullmatch(step).groups()
        lines.append(f'{values[x]} {op} {values[y]} = {values[to]}')
    messages = [{'role': 'user', 'content': fill(question, scene, draw)}]
    needed = asked[:1 + ('{q}' in expression)]
    messages += called([('lookup', {'item': item}, table[item]) for item in needed])
    alone = split == 'train' and draw.random() < alone_share
    said = fill(result, scene, draw)
    if alone:
        said = '<think>' + '\n'.join(lines) + f'</think>\n{said}'
    else:
        messages += called([('calculate', {'expression': expression.format(**values)}, values[to])])
    row = {'messages': [*messages, {'role': 'assistant', 'content': said}], 'table': dict(sorted(table.items())),
           'answer': str(values[to]), 'grader': 'number', 'steps': len(lines), 'kind': kind}
    return row | ({'tools': [of for of in tools.signatures if of['function']['name'] == 'lookup']} if alone else {})


def called(calls):
    """Calls with their results, (name, arguments, result) -> the assistant's message and those of the tools."""
    return [{'role': 'assistant', 'content': '', 'tool_calls': [
        {'type': 'function', 'function': {'name': name, 'arguments': arguments}} for name, arguments, _ in calls]},
        *({'role': 'tool', 'name': name, 'content': str(result)} for name, _, result in calls)]


def draw_rows(split, count, tools):
    """Yields count rows with different questions; which ones does not depend on the other splits."""
    draw, seen = random.Random(f'{seed} {split}'), set()
    templates = [template for template in TEMPLATES if template[1] == (split == 'unseen')]
    for _ in range(count):
        for _ in range(1000):
            row = draw_row(draw.choice(templates), split, draw, tools)
            if row['messages'][0]['content'] not in seen:
                break
        else:
            raise UserError(f'{split}_rows={count}: so many different questions are not to be had: lower it')
        seen.add(row['messages'][0]['content'])
        yield row


def main():
    runtime.configure(globals())
    counts = {'train': train_rows, 'val': val_rows, 'test': test_rows, 'unseen': unseen_rows}
    most = len(HELD_ITEMS)
    if min(counts.values()) < 1 or max_price < 10 or not 2 <= table_size <= most or not 0 <= alone_share <= 1:
        raise UserError('train_rows, val_rows, test_rows and unseen_rows must be >= 1, max_price >= 10, table_size '
                        f'from 2 to {most}, alone_share from 0 to 1')
    tools = load_tools(str(Path(__file__).with_name('shop.py')))
    write_rows(folder_for(__file__, name), {split: draw_rows(split, n, tools) for split, n in counts.items()},
               f'{len(TEMPLATES)} templates, max_price {max_price}, table_size {table_size}, seed {seed}')


if __name__ == '__main__':
    runtime.cli(main)
