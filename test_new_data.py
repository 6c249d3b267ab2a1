# ruff: noqa: F811
"""Datasets of rows: the writer, word problems whose truth is computed, GSM8K, Alpaca."""
import hashlib
import itertools
import json
import re
from collections import Counter

import pytest

from dataset import fraction_of, write_rows
from test_all import SHARED, contents, forker, house, load_script, no_proxy, refuses  # noqa: F401
from tokenizer import UserError

NO_NETWORK = {'https_proxy': 'http://127.0.0.1:9', 'HTTPS_PROXY': 'http://127.0.0.1:9'}


def read_rows(folder, *splits):
    """The rows of the splits of a folder, all of one list."""
    return [json.loads(line) for split in splits or ('train', 'val', 'test')
            for line in open(folder / f'{split}.jsonl', encoding='utf-8')]


def question(row):
    return row['messages'][0]['content']


# ----------------------------------------------------------------------------------------------------------------------
# writing rows

def test_rows_are_lines_of_json_counted_and_without_a_tokenizer(tmp_path):
    rows = [{'messages': [{'role': 'user', 'content': 'ü?\n'}], 'n': 1}, {'messages': []}]
    lines = [b'{"messages": [{"role": "user", "content": "\xc3\xbc?\\n"}], "n": 1}\n', b'{"messages": []}\n']
    meta = write_rows(tmp_path, {'train': iter(rows), 'val': rows[1:], 'test': rows[:1]}, 'by hand')
    assert {f.name for f in tmp_path.iterdir()} == {'train.jsonl', 'val.jsonl', 'test.jsonl', 'meta.json'}
    for split, expected in (('train', lines), ('val', lines[1:]), ('test', lines[:1])):
        assert (tmp_path / f'{split}.jsonl').read_bytes() == b''.join(expected)
        assert meta['splits'][split] == {'rows': len(expected), 'bytes': len(b''.join(expected))}
    digest = hashlib.sha256(b''.join(lines + lines[1:] + lines[:1])).hexdigest()
    assert meta == json.loads((tmp_path / 'meta.json').read_text())
    assert set(meta) == {'splits', 'source', 'sha256'} and (meta['source'], meta['sha256']) == ('by hand', digest)


def test_rows_that_cannot_all_be_written_leave_what_was_there(tmp_path):
    def breaks():
        yield {'a': 2}
        raise KeyboardInterrupt

    write_rows(tmp_path, {'train': [{'a': 1}], 'val': [{'a': 1}]}, '')
    before = contents(tmp_path)
    for rows, error in ((breaks(), KeyboardInterrupt), ([], UserError)):
        with pytest.raises(error):
            write_rows(tmp_path, {'train': [{'a': 2}], 'val': rows}, '')
        assert contents(tmp_path) == before


def test_a_text_alone_decides_its_fraction():
    places = [fraction_of(f'text {i}') for i in range(4000)]
    assert places == [fraction_of(f'text {i}') for i in range(4000)] and 0 <= min(places) <= max(places) < 1
    assert all(abs(sum(place < share for place in places) - share * 4000) < 110 for share in (0.05, 0.1, 0.5, 0.9))


# ----------------------------------------------------------------------------------------------------------------------
# word problems

@pytest.fixture(scope='module')
def problems(tmp_path_factory):
    """(the script, {split: rows}) of 8,000, 1,500 and 1,000 word problems, with the template of each row."""
    script, rows = load_script('wordproblems'), {}
    templates = script.read_templates()
    for split, count in (('train', 8000), ('val', 1500), ('test', 1000)):
        rows[split] = list(script.draw_rows(split, count, templates))
    return script, rows


def all_rows(problems):
    return [row for rows in problems[1].values() for row in rows]


def equations(row):
    """[(x, op, y, result, remainder or None)] of the lines of the solution, all of them equations."""
    think, visible = re.fullmatch(r'<think>(.*)</think>\n(.+)', row['messages'][1]['content'], re.S).groups()
    found = [re.fullmatch(r'(\d+) ([-+*/]) (\d+) = (\d+)(?: remainder (\d+)|(?: [a-z][a-z ]*)?)', line)
             for line in think.split('\n')]
    assert all(found), think
    return [(int(x), op, int(y), int(result), rest and int(rest)) for x, op, y, result, rest in
            (m.groups() for m in found)], visible


def test_every_equation_is_true_and_the_last_gives_the_answer(problems):
    for row in all_rows(problems):
        steps, visible = equations(row)
        for x, op, y, result, rest in steps:
            if rest is not None:
                assert op == '/' and x == y * result + rest and 0 < rest < y, row
            else:
                assert {'+': x + y, '-': x - y, '*': x * y, '/': x / y}[op] == result > 0, row
        assert re.findall(r'\d+', visible)[-1] == row['answer'], row
        *_, result, rest = steps[-1]
        assert int(row['answer']) in ((result,) if rest is None else (result, rest)), row
        assert row['steps'] == len(steps) and row['grader'] == 'number' and list(row)[0] == 'messages'
        assert [m['role'] for m in row['messages']] == ['user', 'assistant']


def test_a_remainder_answers_what_is_left_and_a_quotient_what_each_gets(problems):
    seen = Counter()
    for row in all_rows(problems):
        (*_, (*_, quotient, rest)), _ = equations(row)
        if rest is not None:
            left = re.search('left|without|last group', question(row)) is not None
            assert int(row['answer']) == (rest if left else quotient), row
            seen[left] += 1
    assert min(seen[False], seen[True]) > 50


WORDS = {'half as many': 2, 'equally with': 2, 'The three share': 3}


def test_the_equations_use_the_numbers_of_the_question(problems):
    """Each number of the question comes in, and what comes in is of the question, an earlier result or in words."""
    for row in all_rows(problems):
        given, used = Counter(map(int, re.findall(r'\d+', question(row)))), Counter()
        results, steps = set(), equations(row)[0]
        words = {number for words, number in WORDS.items() if words in question(row)} | {
            1 for x, op, *_ in steps if op == '+' and any(rest for *_, rest in steps)}  # one more for those who remain
        for x, _, y, result, rest in steps:
            assert all(z in given or z in results or z in words for z in (x, y)), row
            used.update((x, y))
            results |= {result, rest}
        unused = set(given) - set(used)
        assert unused <= ({2} if 'weekend' in question(row) else set()), row


def test_numbers_stay_small(problems):
    for row in all_rows(problems):
        for x, op, y, result, _ in equations(row)[0]:
            assert max(x, y, result) <= 180 and (op != '/' or result <= 20), row


def test_a_problem_solved_by_hand_is_solved_so_by_its_plan(problems):
    solve, templates = problems[0].solve, problems[0].read_templates()
    for words, numbers, answer in (
            ('half as many', dict(a=12), {'s': 6, 't': 18}), ('4 legs. How many legs do', dict(a=7), {'s': 28}),
            ('A tent has room', dict(a=23, b=5), {'q': 4, 'r': 3, 's': 5}), ('A tent has room', dict(a=20, b=5), None),
            ('still have]?', dict(a=9, b=9), None), ('Each friend gets', dict(a=23, b=5), {'q': 4, 'r': 3}),
            ('until {he} can buy', dict(a=50, b=20, c=6), {'s': 30, 't': 5}),
            ('until {he} can buy', dict(a=50, b=20, c=7), None),
            ('{a class}', dict(a=2, b=10, c=3, d=11), {'s': 20, 't': 23, 'q': 2, 'r': 1, 'u': 3})):
        plan = next(t['plan'] for t in templates if words in t['question'])
        values = solve(plan, numbers)
        assert (values and {k: v for k, v in values.items() if k and k not in numbers}) == answer, words


def test_splits_of_word_problems_share_no_question_no_name_and_no_template(problems):
    script, rows = problems
    questions = {split: {question(row) for row in rows[split]} for split in rows}
    assert {split: len(found) for split, found in questions.items()} == {'train': 8000, 'val': 1500, 'test': 1000}
    names = {split: {word for text in questions[split] for word in re.findall(r'\b[A-Z][a-z]+', text)} &
             set(script.PERSONS) for split in rows}
    assert not names['train'] & (names['val'] | names['test']) and len(names['train']) > 90 and len(names['val']) > 15
    for one, other in itertools.combinations(rows, 2):
        assert not questions[one] & questions[other]
    # A question without its names, and with train's numbers, is never one of val: nothing but the names would be new.
    bare = {split: {re.sub('|'.join(script.PERSONS), 'N', text) for text in questions[split]} for split in rows}
    assert not bare['train'] & bare['val']
    # What is left without names, numbers and what comes in them is shared by train and val, never with test.
    def ending(text):
        return re.sub(r'\d+', '0', text)
    shapes = {split: {ending(text) for text in bare[split]} for split in rows}
    assert not shapes['test'] & (shapes['train'] | shapes['val']) and shapes['train'] & shapes['val']


def test_the_same_numbers_of_a_template_are_never_in_both_train_and_val(problems):
    books = {split: {tuple(re.findall(r'\d+', question(row))) for row in problems[1][split]
                     if 'is reading a book' in question(row)} for split in ('train', 'val')}
    assert len(books['train']) > 50 and len(books['val']) > 10 and not books['train'] & books['val']


def test_word_problems_have_many_templates_kinds_and_words(problems):
    script, rows = problems
    templates = script.read_templates()
    kinds = {'addition', 'multiplication', 'sharing', 'comparison', 'money', 'time', 'mixed'}
    tests = Counter(t['kind'] for t in templates if t['test'])
    assert len(templates) - tests.total() >= 60 and tests.keys() == kinds and min(tests.values()) >= 2
    for split in rows:
        assert {row['kind'] for row in rows[split]} == kinds
        share = Counter(row['steps'] for row in rows[split])
        assert all(abs(share[n] / len(rows[split]) - expected) < 0.05 for n, expected in
                   ((1, 0.35), (2, 0.35), (3, 0.2), (4, 0.1))), share
    assert len(script.PERSONS) >= 100 and sum(len(who.split()) for who in script.NAMES.values()) == len(script.PERSONS)
    objects = [word for pool in ('toy', 'fruit', 'treat', 'ware', 'bloom') for word in script.POOLS[pool]]
    assert len(set(objects)) == len(objects) >= 80


def test_word_problems_are_clean_english(problems):
    texts = [text for row in all_rows(problems) for text in (question(row), row['messages'][1]['content'])]
    for text in texts:
        assert not re.search(r'[{}\[\]|;]|  | [.,?]|[.,?]{2}|\b(\w+) \1\b(?! =)|[.?][A-Za-z]', text), text
        assert not re.search(r'(?:^|[.?] )[a-z]', text), text
        assert not re.search(r'\b[aA]n (?!hour)[^aeiou]|\b[aA] [aeiou]', text), text
        assert not re.search(r'\b1 (?!o\'clock|remainder|and)(?:[a-z]+ )?[a-z]+s\b(?! (left|each|long|$))', text) or \
            re.search(r'\b1 (bus|[a-z]+ (is|has|costs|more))\b', text), text
    for row in all_rows(problems):
        assert 15 <= len(question(row).split()) <= 45 and question(row).endswith('?'), row
        for count, _ in re.findall(r'(\d+) (child|person|apple|box|day|hour|cherry|dollar)\b', str(row)):
            assert count == '1', row
        for count, _ in re.findall(r'(\d+) (children|people|apples|boxes|days|hours|cherries|dollars)\b', str(row)):
            assert count != '1', row
        assert not re.search(r'\b1 [a-z]+ are\b|\b(?!1\b)\d+ [a-z]+ is\b', row['messages'][1]['content']), row


@pytest.mark.parametrize('one, many', [
    ('apple', 'apples'), ('box', 'boxes'), ('cherry', 'cherries'), ('day', 'days'), ('person', 'people'),
    ('toy car', 'toy cars'), ('peach', 'peaches'), ('radish', 'radishes'), ('sheep', 'sheep'), ('goose', 'geese'),
    ('potato', 'potatoes'), ('bus', 'buses'), ('class', 'classes'), ('granola bar', 'granola bars')])
def test_a_count_goes_with_its_noun(problems, one, many):
    assert problems[0].plural(one) == many
    assert problems[0].phrase('a toy', {'a': 1, 'toy': one}, None) == f'1 {one}'
    assert problems[0].phrase('a toy', {'a': 7, 'toy': one}, None) == f'7 {many}'


def test_pronouns_are_those_of_the_person(problems):
    script = problems[0]
    for row in all_rows(problems):
        found = re.findall(r'\b(she|her|he|him|his)\b', question(row), re.I)
        assert len({word.lower() in ('she', 'her') for word in found}) <= 1, row
    people = {name: who for who, names in script.NAMES.items() for name in names.split()}
    assert people['Mia'] == 'she' and people['Ben'] == 'he'
    for row in all_rows(problems):
        begins = re.match(r'(\w+) has .*? (She|He|she|he) ', question(row))
        if begins and begins[1] in people and len(set(people) & set(re.findall(r'\w+', question(row)))) == 1:
            assert people[begins[1]] == begins[2].lower(), row


def test_word_problems_are_prepared(house):
    folder, small = house.root / 'data/wordproblems', 'wordproblems --train_rows=300 --val_rows=60 --test_rows=70'
    assert house(small)[0][::2] == (0, '')
    assert [len(read_rows(folder, split)) for split in ('train', 'val', 'test')] == [300, 60, 70]
    before, digest = contents(folder), json.loads((folder / 'meta.json').read_text())['sha256']
    assert house(small)[0][0] == 0 and contents(folder) == before
    assert house(f'{small} --train_rows=301')[0][0] == 0  # the held-out rows are the same
    assert (folder / 'val.jsonl').read_bytes() == before[str(folder / 'val.jsonl')]
    assert house(f'{small} --seed=2')[0][0] == 0
    assert json.loads((folder / 'meta.json').read_text())['sha256'] != digest
    assert house(f'{small} --max_steps=2 --max_number=20')[0][0] == 0
    rows = read_rows(folder)
    assert {row['steps'] for row in rows} == {1, 2}
    assert all(max(x, y) <= 20 for row in rows if row['kind'] == 'addition' and row['steps'] == 1
               for x, _, y, _, _ in equations(row)[0])
    refuses(house, [(['train_rows'], 'wordproblems --train_rows=0'), (['test_rows'], 'wordproblems --test_rows=0'),
                    (['max_number at 20'], 'wordproblems --max_number=19'),
                    (['max_steps is 1 to 4'], 'wordproblems --max_steps=5'),
                    (['max_steps is 1 to 4'], 'wordproblems --max_steps=0'),
                    (["'kinds'"], 'wordproblems --kinds=money')])


def test_more_questions_than_there_are_is_refused(problems, monkeypatch):
    script = problems[0]
    template = dict(kind='k', test=False, question='{a}?', ranges={'a': (2, 9)}, plan=[('s', '', 'a', '+', 'a', '')],
                    result='{s}')
    monkeypatch.setattr(script, 'max_steps', 1)
    rows = script.draw_rows('train', 50, [template])
    with pytest.raises(UserError, match='train_rows=50: so many different questions are not to be had'):
        list(rows)


# ----------------------------------------------------------------------------------------------------------------------
# GSM8K and Alpaca

def test_gsm8k_becomes_rows_without_calculator_marks(house):
    source = SHARED / 'gsm8k'
    if not source.exists():
        pytest.skip(f'{source} is not here')
    folder = house.root / 'data/gsm8k'
    assert house(f'gsm8k --input={source}')[0][0] == 0
    rows = {split: read_rows(folder, split) for split in ('train', 'val', 'test')}
    assert len(rows['train']) + len(rows['val']) == 7473 and len(rows['test']) == 1319 and 320 < len(rows['val']) < 430
    assert rows['train'][0] == {
        'messages': [{'role': 'user', 'content': 'Natalia sold clips to 48 of her friends in April, and then she sold '
                      'half as many clips in May. How many clips did Natalia sell altogether in April and May?'},
                     {'role': 'assistant', 'content': '<think>Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 '
                      '= 72 clips altogether in April and May.</think>\nThe answer is 72.'}],
        'answer': '72', 'grader': 'number', 'steps': 2}
    published = {json.loads(line)['question'].strip(): json.loads(line)['answer'].split()[-1].replace(',', '')
                 for split in ('train', 'test') for line in open(source / f'{split}.jsonl')}
    for row in itertools.chain(*rows.values()):
        think, visible = row['messages'][1]['content'].split('</think>\n')
        assert not re.search('<<|>>|####', think) and think.startswith('<think>')
        assert row['answer'] == published[question(row)] and visible == f'The answer is {row["answer"]}.'
        assert row['steps'] == think.count('\n') + 1
    assert len({question(row) for row in itertools.chain(*rows.values())}) == 7473 + 1319


def test_a_wrong_gsm8k_is_refused(house, tmp_path):
    (house.root / 'wrong').mkdir()
    for split in ('train', 'test'):
        (house.root / 'wrong' / f'{split}.jsonl').write_text('{"question": "a", "answer": "b\\n#### 3"}\n')
    refuses(house, [(['wrong/train.jsonl', 'sha256', 'another file'], 'gsm8k --input=wrong'),
                    (['absent/train.jsonl', 'no such file', 'https://raw'], 'gsm8k --input=absent'),
                    (['cannot download https://raw', 'train.jsonl', '--input'], 'gsm8k')], **NO_NETWORK)
    script, path = load_script('gsm8k'), tmp_path / 'f.jsonl'
    good = '{"question": "a", "answer": "1+1=<<1+1=2>>2\\n\\nso 1,002\\n#### 1,002"}\n'
    path.write_text(good)
    row, = script.read_rows(path)
    assert row['messages'][1]['content'] == '<think>1+1=2\nso 1,002</think>\nThe answer is 1002.' and row['steps'] == 2
    for bad in ('', '[]', '{"question": "a"}', '{"question": 3, "answer": "b\\n#### 3"}',
                '{"question": "a", "answer": "b"}', '{"question": "a", "answer": "b\\n#### three"}'):
        path.write_text(good + bad + '\n' + good)
        with pytest.raises(UserError, match='f.jsonl, line 2: not a JSON object with a "question"') as error:
            list(script.read_rows(path))
        assert '\n' not in str(error.value)


def item(instruction, output='Yes.', **more):
    return {'instruction': instruction, 'output': output} | more


def chat(prompt, answer='Yes.'):
    return {'messages': [{'role': 'user', 'content': prompt}, {'role': 'assistant', 'content': answer}]}


def test_instructions_become_chats(house):
    items = [item(f'Is {i} a number?', input='', chosen='x', rejected='y') for i in range(400)]
    items += [item('Spell it.', 'ê', input='e\n'), item('Spell it.', 'e', input='e\n'), item('Say.', input='')]
    items += items[:7]
    (house.root / 'a.json').write_text(json.dumps(items, indent=2))
    (house.root / 'b.jsonl').write_text('\n'.join(json.dumps(i, ensure_ascii=False) for i in items[::-1]) + '\n\n')
    shares = '--val_fraction=0.2 --test_fraction=0.1'
    results = house(f'alpaca --input=a.json --name=a {shares}', f'alpaca --input=b.jsonl --name=b {shares}',
                    f'alpaca --input=a.json {shares} --seed=2', 'alpaca --input=a.json --name=c')
    assert [r[0] for r in results] == [0] * 4, results
    assert all('7 rows were there before' in r[1] for r in results), results
    data = house.root / 'data'
    rows = {split: read_rows(data / 'a', split) for split in ('train', 'val', 'test')}
    every = [row for split in rows.values() for row in split]
    assert len(every) == 403 and 50 < len(rows['val']) < 110 and 20 < len(rows['test']) < 62
    expected = [chat(f'Is {i} a number?') for i in range(400)]
    expected += [chat('Spell it.\n\ne', 'ê'), chat('Spell it.\n\ne', 'e'), chat('Say.')]
    assert sorted(map(json.dumps, every)) == sorted(map(json.dumps, expected))
    prompts = [{question(row) for row in split} for split in rows.values()]
    assert sum(map(len, prompts)) == len(set().union(*prompts)) == 402  # a prompt lies in one split
    for split in rows:  # the order of the rows changes nothing but their order
        assert Counter(map(json.dumps, rows[split])) == Counter(map(json.dumps, read_rows(data / 'b', split)))
    assert Counter(map(question, rows['val'])) != Counter(map(question, read_rows(data / 'alpaca', 'val')))
    assert not (data / 'c' / 'test.jsonl').exists() and not list(data.glob('*/tokenizer.json'))


BAD_ITEMS = [(3, 'not a JSON object'), ({'output': 'a'}, '"instruction" must be a text'),
             (item('a', ''), '"output" must be a text that is not empty'), (item('a', None), '"output" must be a text'),
             (item('a', ['b']), '"output"'), (item(' '), '"instruction"'),
             (item('a', input=3), '"input" must be a text'), (item('a', input=None), '"input"'),
             (item('\ud800'), 'surrogates not allowed')]


def test_malformed_instructions_are_named_or_counted(house):
    good, cases = [item(f'Is {i} a number?') for i in range(60)], []
    for i, (bad, words) in enumerate(BAD_ITEMS):
        (house.root / f'{i}.json').write_text(json.dumps([*good, bad]))
        (house.root / f'{i}.jsonl').write_text('\n'.join(map(json.dumps, [*good, bad])))
        cases += [([f'{i}.json, row 61: ', words, '--strict=False'], f'alpaca --input={i}.json'),
                  ([f'{i}.jsonl, line 61: ', words], f'alpaca --input={i}.jsonl')]
    (house.root / 'cut.jsonl').write_text(json.dumps(good[0]) + '\n{"instruction": "a"')
    (house.root / 'cut.json').write_text('[{"instruction": "a"')
    (house.root / 'latin.json').write_bytes(b'[\xe9]')
    refuses(house, [*cases, (['cut.jsonl, line 2: '], 'alpaca --input=cut.jsonl'),
                    (['cut.json: not a list in JSON'], 'alpaca --input=cut.json'),
                    (['latin.json: byte 1 is not UTF-8'], 'alpaca --input=latin.json'),
                    (['absent', 'no such file', 'https://raw'], 'alpaca --input=absent'),
                    (['name=', '--name=NAME'], 'alpaca --input=0.json --name=a/b'),
                    (["name='shakespeare'", 'no prepare.py'], 'alpaca --input=0.json --name=shakespeare'),
                    (['val_fraction=0.0'], 'alpaca --input=0.json --val_fraction=0'),
                    (['test_fraction=0.9'], 'alpaca --input=0.json --test_fraction=0.9'),
                    (['cannot download https://raw', 'alpaca_data.json', '--input'], 'alpaca')], **NO_NETWORK)
    (house.root / 'all.json').write_text(json.dumps(good + [bad for bad, _ in BAD_ITEMS]))
    (status, out, err), = house('alpaca --input=all.json --strict=False --name=some')
    assert status == 0 and f'{len(BAD_ITEMS)} malformed rows were left out' in out, err
    assert len(read_rows(house.root / 'data/some', 'train', 'val')) == 60


def test_a_published_file_of_another_length_is_refused(house):
    (house.root / 'data/alpaca/alpaca_data.json').write_text(json.dumps([item('a')]))
    refuses(house, [(['alpaca_data.json: 1 rows, not 52,002'], 'alpaca')])


def test_real_instructions_become_chats(house):
    source = SHARED / 'instruction-data.json'
    if not source.exists():
        pytest.skip(f'{source} is not here')
    assert house(f'alpaca --input={source}')[0][0] == 0
    rows = read_rows(house.root / 'data/alpaca', 'train', 'val')
    assert len(rows) == 1100 and len({question(row) for row in rows}) == 1075
