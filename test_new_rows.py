"""Chats from files to batches, and the grading of answers."""
import itertools
import json
import random
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import transformers

import dataset
from dataset import (
    ChatData,
    find_dataset,
    grade,
    interval,
    kind_of,
    last_number,
    load_chats,
    normalise,
    pass_at_k,
    read_chats,
    rouge_l,
    token_f1,
    visible,
    write_pairs,
)
from test_all import PAIRS, SMALL, run_stage, text_data  # noqa: F401
from tokenizer import UserError, bytes_tokenizer, get_tokenizer, train_bpe

# ----------------------------------------------------------------------------------------------------------------------
# chats

START, END, EOT = 257, 258, 256  # of the tokenizer of bytes


def turn(role, content):
    return {'role': role, 'content': content}


def chat(prompt='Hi', answer='Yes.', **more):
    return {'messages': [turn('user', prompt), turn('assistant', answer)], 'where': 'x', **more}


def random_chats(n, seed=0, longest=40):
    """n different chats of one to three answers, one in three with a system's message."""
    draw, rows = random.Random(seed), []
    for i in range(n):
        messages = [turn('system', f's{i}')] * (i % 3 == 0)
        for _ in range(draw.randint(1, 3)):
            messages += [turn('user', f'{i}:' + 'q' * draw.randint(0, longest)),
                         turn('assistant', f'{i}=' + 'a' * draw.randint(0, longest))]
        rows.append({'messages': messages, 'where': f'x, line {i}'})
    return rows


def conversations(arrays):
    """What a batch holds, padded or packed: (inputs, targets) of each conversation, in order."""
    idx, targets, positions, segments = arrays if len(arrays) == 4 else (*arrays, None, None)
    found = []
    for b in range(len(idx)):
        if segments is None:  # a row ends with its last token, <|im_end|> here
            n = len(idx[b]) - int((idx[b][::-1] == EOT).cumprod().sum())
            assert (targets[b, n:] == -100).all()
            found.append((*idx[b, :n].tolist(), *targets[b, :n].tolist()))
            continue
        last = segments[b].max()
        padded = segments[b] == 0
        assert (idx[b][padded] == EOT).all() and (targets[b][padded] == -100).all() and not positions[b][padded].any()
        assert [k for k, _ in itertools.groupby(segments[b])] == [*range(1, last + 1), 0][:last + padded.any()]
        for k in range(1, last + 1):
            here = segments[b] == k
            assert positions[b][here].tolist() == list(range(here.sum()))
            found.append((*idx[b][here].tolist(), *targets[b][here].tolist()))
    return found


def test_only_what_the_assistant_says_is_learned():
    rows = [{'messages': [turn('system', 'Be'), turn('user', 'Hi'), turn('assistant', 'Yo'), turn('user', '?'),
                          turn('assistant', 'No')], 'where': 'x'}, chat('a', 'b')]
    prompt = [START, *b'system\nBe', END, 10, START, *b'user\nHi', END, 10, START, *b'assistant\n']
    between = [10, START, *b'user\n?', END, 10, START, *b'assistant\n']
    whole = [*prompt, *b'Yo', END, *between, *b'No', END, 10]
    expected = [-100] * (len(prompt) - 1) + [*b'Yo', END] + [-100] * len(between) + [*b'No', END, -100]
    data = ChatData(rows, bytes_tokenizer(), 128)
    idx, targets = data.read([0])
    assert idx.tolist() == [whole[:-1]] and targets.tolist() == [expected]
    assert idx.dtype == targets.dtype == data.lengths.dtype == np.int64
    short = [START, *b'user\na', END, 10, START, *b'assistant\nb', END]
    idx, targets = data.read([0, 1])
    assert idx.shape == (2, len(whole) - 1) and idx[1].tolist() == short + [EOT] * (len(whole) - 1 - len(short))
    assert targets[1].tolist() == [-100] * 19 + [ord('b'), END] + [-100] * (len(whole) - 22)
    assert (data.n_rows, data.n_tokens, data.row_tokens) == (2, 8, 4) and data.lengths.tolist() == [len(whole) - 1, 22]
    assert data.prompt(0) == prompt + whole[len(prompt):len(prompt) + 3] + between and data.rows_kept == rows
    everything = ChatData(rows, bytes_tokenizer(), 128, train_on_prompt=True)
    assert everything.read([0])[1].tolist() == [whole[1:]] and everything.n_tokens == len(whole) - 1 + 22
    alone = ChatData([{'messages': [turn('assistant', 'b')], 'where': 'x'}], bytes_tokenizer(), 128)
    assert alone.prompt(0) == [START, *b'assistant\n'] and alone.n_tokens == 2


@pytest.mark.parametrize('kind', ['bytes', 'bpe'])
def test_rows_equal_the_template_and_mask_of_transformers(kind, tmp_path):
    ours = bytes_tokenizer() if kind == 'bytes' else train_bpe('What is it? It is 4, and that is it.\n' * 20, 300)
    ours.to_hf(tmp_path)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    template = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
                "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
                "{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}")
    chats = [[turn('user', 'What is it?'), turn('assistant', 'It is 4.')],
             [turn('system', 'That is it.'), turn('user', 'What?'), turn('assistant', 'It, é.'), turn('user', 'And?'),
              turn('tool', '4'), turn('assistant', 'That is 4.')]]
    data = ChatData([{'messages': messages, 'where': 'x'} for messages in chats], ours, 512)
    for row, messages in enumerate(chats):
        theirs = auto.apply_chat_template(messages, chat_template=template, return_dict=True,
                                          return_assistant_tokens_mask=True)
        ids, mask = theirs['input_ids'], theirs['assistant_masks']
        assert sum(mask) > 3
        idx, targets = data.read([row])
        assert idx[0].tolist() == ids[:-1]
        assert targets[0].tolist() == [i if m else -100 for i, m in zip(ids[1:], mask[1:], strict=True)]
        last = len(mask) - 1 - mask[::-1].index(1)
        while mask[last - 1]:
            last -= 1
        assert data.prompt(row) == ids[:last]


def test_rows_that_are_too_long_are_left_out_or_cut_and_counted():
    # 'a' makes 22 inputs with 'b', of which 21 and 22 have targets; every more letter of the prompt or answer one more
    rows = [chat('a', 'b'), chat('aaaaaa', 'b'), chat('a', 'bcdefg'), chat('a' * 30, 'b')]
    tokenizer = bytes_tokenizer()
    data = ChatData(rows, tokenizer, 22)
    assert data.dropped == {'too_long': 3, 'truncated': 0, 'nothing_to_learn': 0} and data.rows_kept == rows[:1]
    exact = ChatData(rows, tokenizer, 27)
    assert exact.dropped == {'too_long': 1, 'truncated': 0, 'nothing_to_learn': 0} and exact.n_rows == 3
    left = ChatData(rows, tokenizer, 22, too_long='left')
    assert left.dropped == {'too_long': 0, 'truncated': 3, 'nothing_to_learn': 0}
    assert left.lengths.tolist() == [22] * 4 and left.read([1])[0][0].tolist() == [
        *b'\naaaaaa', END, 10, START, *b'assistant\nb', END][-22:]
    assert left.read([2])[1][0].tolist() == [-100] * 14 + [*b'bcdefg', END, -100]
    right = ChatData(rows, tokenizer, 22, too_long='right')
    assert right.dropped == {'too_long': 0, 'truncated': 1, 'nothing_to_learn': 2} and right.rows_kept == rows[::2]
    assert right.read([1])[1][0].tolist() == [-100] * 19 + [*b'bcd']
    for how in ('drop', 'right'):
        with pytest.raises(UserError, match='none of 4 rows has an answer within 9 tokens'):
            ChatData(rows, tokenizer, 9, too_long=how)


def test_packed_rows_are_the_rows_themselves():
    rows = random_chats(60)
    for n, size in ((60, 300), (60, 1000), (1, 300)):
        plain, packed = (ChatData(rows[:n], bytes_tokenizer(), size, pack=pack) for pack in (False, True))
        assert plain.n_rows == packed.n_rows and plain.n_tokens == packed.n_tokens
        n_blocks = len(packed._chunk(0))
        one, two = conversations(plain.read(np.arange(plain.n_rows))), conversations(packed.batch(0, n_blocks))
        assert sorted(one) == sorted(two) == sorted(conversations(packed.read_packed([range(packed.n_rows)])))
        assert len({*one}) == plain.n_rows and len(packed.read([0])) == 2
        arrays = packed.batch(0, 3)
        assert all(a.dtype == np.int64 and a.shape == arrays[0].shape for a in arrays) and len(arrays) == 4
        assert arrays[0].shape[1] <= size and (arrays[3] > 0).any(0).all()
        for data in (plain, packed):
            for first, count in ((0, 5), (7, 11)):
                assert data.n_targets(first, count) == (data.batch(first, count)[1] != -100).sum()


def test_every_epoch_has_every_row_once_packed_or_not():
    plain, packed = (ChatData(random_chats(37), bytes_tokenizer(), 400, pack=pack) for pack in (False, True))
    everything = sorted(conversations(plain.read(np.arange(plain.n_rows))))
    orders, block = [], 0
    for epoch in range(3):
        rows = plain.rows(epoch * plain.n_rows, plain.n_rows).tolist()
        orders.append(rows)
        assert sorted(conversations(plain.batch(epoch * plain.n_rows, plain.n_rows))) == everything
        found = []
        while len(found) < len(everything):
            found += conversations(packed.batch(block, 1))
            block += 1
        assert sorted(found) == everything
    assert orders[0] != orders[1] != orders[2] != orders[0] and orders[0] != sorted(orders[0])


@pytest.mark.parametrize('pack', [False, True])
@pytest.mark.parametrize('curriculum', [False, True])
def test_an_item_depends_on_seed_and_number_only(pack, curriculum, monkeypatch):
    monkeypatch.setattr(dataset, 'CHUNK_ROWS', 16)  # many chunks, which cross epochs

    def fresh(seed=5):
        data = ChatData(random_chats(50), bytes_tokenizer(), 400, seed, pack=pack)
        if curriculum:
            data.pace(np.arange(data.n_rows)[::-1], 120)
        return data
    n = 260 if not pack else 90
    stream = sum([conversations([a[[i]] for a in arrays]) for arrays in [fresh().batch(0, n)] for i in range(n)], [])
    straight = fresh()
    items = [conversations(straight.batch(i, 1)) for i in range(n)]
    assert sum(items, []) == stream
    for first, count in ((n - 3, 3), (7, 30), (0, 1), (n // 2, 5)):
        resumed = fresh()
        assert resumed.n_targets(first, count) == sum(sum(t != -100 for t in c[len(c) // 2:])
                                                      for c in sum(items[first:first + count], []))
        assert conversations(resumed.batch(first, count)) == sum(items[first:first + count], [])
    assert conversations(fresh(6).batch(0, n)) != stream
    if pack:  # the same rows as unpacked ones, chunk by chunk
        rows = straight.rows(0, 16 * 5).tolist()
        assert sorted(sum(sum((straight._chunk(c) for c in range(5)), []), [])) == sorted(rows)


def test_blocks_are_full_and_come_in_an_order_of_their_own():
    draw = random.Random(0)
    rows = [chat('q' * draw.randint(20, 150), f'{i}') for i in range(3000)]
    data = ChatData(rows, bytes_tokenizer(), 512, pack=True)
    blocks = data.blocks(0, 300)
    lengths = [int(data.lengths[block].sum()) for block in blocks]
    assert max(lengths) <= 512 and sum(lengths) / (512 * 300) > 0.95
    ends = data.block_ends
    assert ends[:2] == [0, len(data._chunk(0))] and len(ends) >= 2
    longest = [max(data.lengths[block]) for block in data._chunk(0)]
    assert longest != sorted(longest, reverse=True)
    assert conversations(data.batch(0, 1)) != conversations(data.batch(ends[1], 1))


def test_best_fit_puts_each_where_it_leaves_least_room():
    # by hand: 7 | 6 | 5 -> new | 4 beside 6 (7 leaves 3) | 3 beside 7 | 3 beside 5 | 2 beside 5 and 3 | 2 -> new
    lengths = np.array([4, 7, 2, 3, 6, 5, 3, 2])
    assert dataset.best_fit(lengths, 10) == [[1, 3], [4, 0], [5, 6, 2], [7]]
    assert dataset.best_fit(np.array([10, 10]), 10) == [[0], [1]] and dataset.best_fit(np.array([1]), 9) == [[0]]


def test_a_curriculum_starts_with_easy_rows_and_ends_with_all():
    n, count, start = 80, 1000, 0.5
    data = ChatData([chat(f'{i}', 'b') for i in range(n)], bytes_tokenizer(), 64, seed=3)
    before = data.rows(0, 3 * n).tolist()
    difficulty = np.random.RandomState(0).permutation(n) // 2  # each twice: the lower number is the easier
    data.pace(difficulty, count, start)
    order = sorted(range(n), key=lambda row: (difficulty[row], row))
    rank = {row: place for place, row in enumerate(order)}
    ranks = np.array([rank[row] for row in data.rows(0, count + 2 * n).tolist()])
    # by hand: 80 · 0.5 = 40; sqrt(0.75 / 4 + 0.25) = 0.6614; sqrt(0.75 / 2 + 0.25) = 0.7906; sqrt(0.8125) = 0.9014
    for i, easy in ((0, 40), (250, 52.92), (500, 63.25), (750, 72.12), (999, 79.97)):
        assert ranks[:i + 1].max() < easy
    for i in (250, 500, 750, 900):  # what is allowed is used, one row as much as another
        near = ranks[i - 50:i + 50]
        assert near.max() > 0.9 * n * np.sqrt(0.75 * (i - 50) / count + 0.25)
        assert abs(near.mean() - n * np.sqrt(0.75 * i / count + 0.25) / 2) < 9
    assert sorted(ranks[count:count + n]) == sorted(ranks[count + n:]) == list(range(n))
    draws = np.array([data.rows(0, 1)[0] for data.pace_key in (data.pace_key + np.uint64(k) for k in range(2000))])
    assert set(draws) == set(order[:40]) and max(Counter(draws.tolist()).values()) < 80  # 50 in the mean
    data.pace(difficulty, 0)
    assert data.rows(0, 3 * n).tolist() == before
    data = ChatData([chat(f'{i}', 'b') for i in range(n)], bytes_tokenizer(), 64, seed=3, pack=True)
    data.blocks(0, 5)
    data.pace(difficulty, count, start)  # forgets the blocks of before
    # the first chunk has all 80 rows that come first: 80 · sqrt(0.75 · 0.08 + 0.25) = 44.5
    assert max(rank[row] for block in data.blocks(0, 10) for row in block) < 44.5


def test_held_out_rows_are_evenly_spaced():
    data = ChatData([chat(f'{i}') for i in range(40)], bytes_tokenizer(), 64)
    assert data.fixed(8).tolist() == list(range(0, 40, 5))
    assert data.fixed(0).tolist() == data.fixed(99).tolist() == list(range(40))


# ----------------------------------------------------------------------------------------------------------------------
# files

GOOD = {'messages': [turn('user', 'Hi'), turn('assistant', 'Yes.')]}


def lines(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b''.join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b'\n' for r in rows))
    return path


def test_three_shapes_of_rows_are_one(tmp_path):
    system = turn('system', 'Be')
    rows = [GOOD, {'instruction': 'Add', 'input': '1 2', 'output': '3', 'id': 7}, {'instruction': 'Hi', 'output': 'Yo'},
            {'instruction': 'Hi', 'input': '', 'output': 'Yo'},
            {'instruction': 'Hi', 'input': None, 'output': 'Yo', 'messages': None},
            {'prompt': 'Hi', 'completion': 'Yo'},
            {'prompt': [system, turn('user', 'Hi')], 'completion': [turn('assistant', 'Yo')]},
            {'messages': [{'role': 'user', 'content': 'é', 'name': 'x'}, turn('assistant', '4')], 'answer': 4,
             'grader': 'number', 'steps': 2, 'kind': 'sum', 'other': []}, {**GOOD, 'answer': None, 'steps': None}]
    hi = [turn('user', 'Hi'), turn('assistant', 'Yo')]
    expected = [GOOD, {'messages': [turn('user', 'Add\n\n1 2'), turn('assistant', '3')]}, *[{'messages': hi}] * 4,
                {'messages': [system, *hi]}, {'messages': [turn('user', 'é'), turn('assistant', '4')], 'answer': 4,
                                              'grader': 'number', 'steps': 2, 'kind': 'sum'}, GOOD]
    path = lines(tmp_path / 'x.jsonl', rows)
    assert read_chats(path) == ([r | {'where': f'{path}, line {i}'} for i, r in enumerate(expected, 1)], [])
    (tmp_path / 'x.json').write_text('\ufeff' + json.dumps(rows, indent=1))
    assert read_chats(tmp_path / 'x.json')[0] == [
        r | {'where': f'{tmp_path / "x.json"}, row {i}'} for i, r in enumerate(expected, 1)]
    path.write_bytes('\ufeff'.encode() + json.dumps(GOOD).encode() + b'\r\n\r\n' + json.dumps(GOOD).encode())
    assert [row['where'][-6:] for row in read_chats(path)[0]] == ['line 1', 'line 3']


@pytest.mark.parametrize('row, words', [
    (b'{"messages": [', 'not JSON (Expecting value, column 15)'), (b'\xff{}', 'not valid UTF-8 (byte 1 is 0xff)'),
    (b'[' * 200_000, 'not JSON'), (b'1' * 5000, 'not JSON'), ([1], 'not a JSON object but [1]'),
    ({'text': 'x'}, 'it needs "messages"'), ({'prompt': 'x'}, 'it needs "messages"'),
    ({'messages': 'hi'}, '"messages" must be a list'), ({'messages': []}, '"messages" must be a list'),
    ({'messages': ['hi']}, "message 1 must have a \"role\" (system, user, assistant, tool), not 'hi'"),
    ({'messages': [{'content': 'x'}]}, 'message 1 must have a "role"'),
    ({'messages': [turn('human', 'x'), turn('gpt', 'y')]}, "not 'human'"),
    ({'messages': [turn(['user'], 'x')]}, "not ['user']"),
    ({'messages': [turn('user', 'x'), turn('assistant', None)]}, 'the "content" of message 2 must be a text, not None'),
    ({'messages': [turn('user', [{'type': 'text'}])]}, 'the "content" of message 1 must be a text'),
    ({'messages': [turn('user', 'x'), turn('assistant', ' \n')]}, "message 2, the assistant's, is empty"),
    ({'messages': [turn('user', 'x'), turn('assistant', ''), turn('user', 'x'), turn('assistant', 'y')]}, 'is empty'),
    ({'messages': [turn('user', 'x')]}, "its last message is the user's"),
    ({'messages': [turn('user', '\ud800'), turn('assistant', 'y')]}, 'half a surrogate'),
    ({'instruction': 'x', 'output': ''}, 'is empty'), ({'instruction': 5, 'output': 'x'}, '"instruction" must be a'),
    ({'instruction': 'x', 'input': ['y'], 'output': 'x'}, '"input" must be a text'),
    ({'instruction': 'x', 'output': {}}, '"output" must be a text'), ({'messages': None}, 'it needs "messages"'),
    ({'instruction': 'x', 'output': GOOD['messages']}, '"output" must be a text'),
    ({'prompt': 'x', 'completion': 3}, '"completion" must be a text'),
    ({'prompt': [], 'completion': []}, '"messages" must be a list'),
    ({**GOOD, 'answer': [4]}, '"answer" is [4], which it cannot be'), ({**GOOD, 'steps': '2'}, '"steps" is'),
    ({**GOOD, 'steps': True}, '"steps" is True'), ({**GOOD, 'grader': 'judge'}, "\"grader\" is 'judge', not one"),
    ({**GOOD, 'answer': '\udfff'}, 'half a surrogate')], ids=lambda x: str(x)[:30])
def test_a_row_that_is_no_chat_is_named_or_skipped(row, words, tmp_path):
    path = lines(tmp_path / 'x.jsonl', [GOOD, row, GOOD])
    with pytest.raises(UserError, match=re.escape(f'{path}, line 2: ') + '.*' + re.escape(words)) as error:
        read_chats(path)
    assert '\n' not in str(error.value) and len(str(error.value)) < len(str(path)) + 200
    rows, skipped = read_chats(path, strict=False)
    assert [r['where'][-6:] for r in rows] == ['line 1', 'line 3'] and skipped == [str(error.value)]
    alone = lines(tmp_path / 'y.jsonl', [row])
    with pytest.raises(UserError, match='none of its 1 rows is a chat; .*y.jsonl, line 1: '):
        read_chats(alone, strict=False)
    if not isinstance(row, bytes):
        (tmp_path / 'x.json').write_text(json.dumps([GOOD, row]))
        with pytest.raises(UserError, match=re.escape('x.json, row 2: ') + '.*' + re.escape(words)):
            read_chats(tmp_path / 'x.json')


@pytest.mark.parametrize('name, content, words', [
    ('x.jsonl', b'', 'no rows'), ('x.jsonl', b'\n\n', 'no rows'), ('x.json', b'[]', 'no rows'),
    ('x.json', b'', 'not a JSON list'), ('x.json', b'{}', 'not a JSON list (but dict)'),
    ('x.json', b'{"a": 1}\n{"a": 2}', 'line .jsonl'), ('x.json', b'["\xff"]', 'not a JSON list'),
    ('x.jsonl', None, 'No such file')], ids=str)
def test_a_file_without_chats_is_named(name, content, words, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    for strict in (True, False):
        with pytest.raises(UserError, match=re.escape(f'{tmp_path / name}: ') + '.*' + re.escape(words)) as error:
            read_chats(tmp_path / name, strict)
        assert '\n' not in str(error.value)


def test_a_single_file_is_split_by_prompts(tmp_path):
    rows = [chat(f'{i % 50}', f'{i}') for i in range(200)]
    path = str(lines(tmp_path / 'x.jsonl', rows))
    train, val = (load_chats(path, split)[0] for split in ('train', 'val'))

    def prompts(rows):
        return {row['messages'][0]['content'] for row in rows}
    assert len(prompts(val)) == 5 and len(prompts(train)) == 45 and not prompts(train) & prompts(val)
    assert sorted(int(r['messages'][1]['content']) for r in train + val) == list(range(200))
    assert prompts(val) != {str(i) for i in range(5)}
    reversed_path = lines(tmp_path / 'y.jsonl', rows[::-1])  # where a row stands does not matter
    assert prompts(load_chats(reversed_path, 'val')[0]) == prompts(val)
    assert len(prompts(load_chats(path, 'val', val_fraction=0.5)[0])) == 25
    few = lines(tmp_path / 'z.jsonl', rows[:3])
    assert [len(load_chats(few, split)[0]) for split in ('train', 'val')] == [2, 1]
    with pytest.raises(UserError, match='x.jsonl: a single file has only train and val'):
        load_chats(path, 'test')
    with pytest.raises(UserError, match='one prompt'):
        load_chats(lines(tmp_path / 'w.jsonl', [chat('a', 'b'), chat('a', 'c')]), 'val')
    lines(tmp_path / 'v.jsonl', [*rows, {'no': 1}])
    assert load_chats(tmp_path / 'v.jsonl', 'val', strict=False)[1] == [
        f'{tmp_path / "v.jsonl"}, line 201: it needs "messages", or "instruction" and "output", or "prompt" and '
        f'"completion"']


def test_a_folder_of_chats_is_found_and_told_from_tokens_and_pairs(tmp_path, text_data, monkeypatch):  # noqa: F811
    folder = tmp_path / 'mine'
    lines(folder / 'train.jsonl', [chat('a'), chat('b')])
    assert find_dataset(str(folder)) == folder and kind_of(folder) == 'chats' and kind_of(text_data) == 'tokens'
    assert [r['where'] for r in load_chats(str(folder), 'train')[0]] == [
        f'{folder / "train.jsonl"}, line {i}' for i in (1, 2)]
    with pytest.raises(UserError, match=r'mine: no val.jsonl, only train'):
        load_chats(folder, 'val')
    lines(folder / 'test.jsonl', [chat('c')])
    with pytest.raises(UserError, match=r'mine: no val.jsonl, only train and test'):
        load_chats(folder, 'val')
    assert len(load_chats(folder, 'test')[0]) == 1
    (folder / 'meta.json').write_text('{"splits": {}, "source": "me"}')
    assert kind_of(folder) == 'chats'
    (folder / 'meta.json').write_text('{')
    with pytest.raises(UserError, match=r'meta.json: malformed'):
        kind_of(folder)
    write_pairs(tmp_path / 'pairs', get_tokenizer('chars', ['ab']), {'train': [('a', 'b')], 'val': [('b', 'a')]}, 'x')
    assert kind_of(tmp_path / 'pairs') == 'pairs'
    for other, what in ((tmp_path / 'pairs', 'pairs'), (text_data, 'running text')):
        with pytest.raises(UserError, match=f'holds {what}.* not chats'):
            load_chats(other, 'train')
    with pytest.raises(UserError, match='no such dataset'):
        load_chats(str(tmp_path / 'none'), 'train')
    # one that a prepare.py was writing when it died is not whole
    monkeypatch.setattr(dataset, '__file__', str(tmp_path / 'dataset.py'))
    lines(tmp_path / 'data' / 'train.jsonl', [chat()])  # makes data/
    script = ('import pathlib, json; here = pathlib.Path(__file__).parent; (here / "train.jsonl").write_text('
              'json.dumps({"prompt": "a", "completion": "whole"})); (here / "meta.json").write_text("{}")')
    lines(tmp_path / 'data/made/train.jsonl', [chat('half')])
    (tmp_path / 'data/made/prepare.py').write_text(script)
    assert load_chats('made', 'train')[0][0]['messages'][1]['content'] == 'whole'
    lines(tmp_path / 'data/own/train.jsonl', [chat()])
    assert find_dataset('own') == Path(tmp_path / 'data/own')
    with pytest.raises(UserError, match='did you mean own'):
        find_dataset('ownn')


def test_pretraining_says_that_chats_are_for_fine_tuning(run_stage, tmp_path):  # noqa: F811
    lines(tmp_path / 'mine' / 'train.jsonl', [chat()])
    for options in (SMALL, PAIRS):
        status, _, err = run_stage('train', f'--dataset={tmp_path / "mine"}', *options, '--out_dir=run')
        assert status == 2 and 'mine holds chats, which are for sft.py' in err and err.count('\n') == 1


# ----------------------------------------------------------------------------------------------------------------------
# grading


@pytest.mark.parametrize('text, number', [
    ('', None), ('none', None), ('7', 7), ('-3', -3), ('−3', -3), ('1,234.50', Fraction(2469, 2)), ('so $5.', 5),
    ('$1,000,000!', 1000000), ('-$5', -5), ('50%', 50), ('1/2', Fraction(1, 2)), ('-3/4 cup', Fraction(-3, 4)),
    ('1/0', 0), ('10 - 3 = 7', 7), ('10-3', 3), ('x-3', 3), ('(2)-3', 3), ('1, 2, 3', 3), ('1,2,3', 3), ('1,23', 23),
    ('0.1', Fraction(1, 10)), ('.5', Fraction(1, 2)), ('No.5', 5), ('x2', 2), ('**12**', 12), ('\\boxed{-12}', -12),
    ('3\n4 apples.', 4), ('12,345,6', 6), ('1234,567', 567), ('1,2345', 2345), ('007', 7), ('a - 3', 3), ('= -3', -3),
    ('1.50', Fraction(3, 2)), ('9' * 5000, None), ('1' * 400, (10 ** 400 - 1) // 9), ('٣', None), ('5, or so', 5),
    ('2020-01-05', 5)], ids=lambda x: str(x)[:20])
def test_the_last_number_by_hand(text, number):
    assert last_number(text) == number


def test_thoughts_do_not_count():
    assert visible(' a <think>b\nc</think> d <think></think>e ') == 'a  d e'
    assert visible('a<think>b') == 'a' and visible('<think>a</think>b<think>c</think') == 'b' and visible('') == ''
    assert grade('<think>5</think>4', '4', 'number') and not grade('4 <think>5', '5', 'number')


def test_answers_are_graded():
    for text, gold, grader, right in (
            ('It is 1,200.', '1200', 'number', True), ('It is 1200.0', 1200, 'number', True),
            ('0.5', '1/2', 'number', True), ('12', '1200', 'number', False), ('none', '3', 'number', False),
            ('none', 'none', 'number', False),
            ('0.1', 0.1, 'number', True), ('first 3, then 4', '3', 'number', False),
            ('The cat.', 'cat', 'exact', True), ('a cat sat', 'cat', 'exact', False), ('5', 5, 'exact', True)):
        assert grade(text, gold, grader) is right
    with pytest.raises(UserError, match="\"grader\" is 'judge', not one of number, exact"):
        grade('a', 'b', 'judge')


def test_normalised_text_is_squads():
    assert normalise(' The  "Cat", an animal\tof A-Z!') == 'cat animal of az'
    assert normalise('Theatre another AN') == 'theatre another' and normalise("it's") == 'its'
    assert normalise('The.') == ''


def test_f1_of_words_by_hand():
    # 'cat sat on mat' has 3 of 4 words of 'cat on mat', which all are in it: 2 · 3/4 · 1 / (7/4) = 6/7
    assert token_f1('The cat sat on the mat.', 'a cat on a mat') == pytest.approx(6 / 7)
    assert token_f1('a b b c', 'b c c') == pytest.approx(2 * 2 / (3 + 3))  # 'a' is an article; b and c once each
    assert token_f1('x', 'y') == token_f1('', 'y') == token_f1('x', 'the') == 0 and token_f1('the', '') == 1
    assert token_f1('Denver Broncos!', 'denver broncos') == 1


def test_rouge_l_by_hand():
    # Lin 2004, section 3.1: of 'police killed the gunman', 'police kill the gunman' has 3/4, the other 2/4
    assert rouge_l('police kill the gunman', 'police killed the gunman') == pytest.approx(3 / 4)
    assert rouge_l('the gunman kill police', 'Police killed the gunman.') == pytest.approx(2 / 4)
    assert rouge_l('a b c d e f', 'a x c f') == pytest.approx(2 * 3 / 10) and rouge_l("don't", 'don t') == 1
    assert rouge_l('', 'a') == rouge_l('a', '') == rouge_l('', '') == rouge_l('é', 'é') == rouge_l('a', 'b') == 0

    def subsequences(words):
        return {s for n in range(len(words) + 1) for s in itertools.combinations(words, n)}
    draw = random.Random(0)
    for _ in range(100):
        a, b = (draw.choices('abc', k=draw.randint(1, 8)) for _ in 'ab')
        common = max(map(len, subsequences(a) & subsequences(b)))
        assert rouge_l(' '.join(a), ' '.join(b)) == pytest.approx(2 * common / (len(a) + len(b)))


def test_intervals_are_those_published():
    # 8 of 10, as in every table of Wilson's; 0 of 10 has 0 to z^2 / (n + z^2) = 3.8415 / 13.8415
    assert interval([1] * 8 + [0] * 2) == pytest.approx((0.4902, 0.9433), abs=5e-5)
    assert interval([0.0] * 10) == pytest.approx((0, 0.27753), abs=5e-5) and interval([0])[0] == 0
    assert interval([True] * 10) == pytest.approx((0.72247, 1), abs=5e-5) and interval([1] * 10)[1] <= 1
    # 1, 2, 3, 4, 5 / 5: mean 0.6, variance 0.1, half = 1.96 sqrt(0.1 / 5)
    assert interval([0.2, 0.4, 0.6, 0.8, 1.0]) == pytest.approx((0.6 - 0.27718, 0.6 + 0.27718), abs=5e-5)
    assert interval([0.3]) == (0.3, 0.3)


def test_pass_at_k_counts_subsets():
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            picks = [*itertools.combinations([1] * c + [0] * (n - c), k)]
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, picks)) / len(picks))
    for n, c, k in ((3, 1, 4), (3, 4, 1), (3, 1, 0)):
        with pytest.raises(UserError, match='take k from 1 to 3'):
            pass_at_k(n, c, k)
