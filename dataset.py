"""
What `data/` holds -> batches: windows of tokens, and rows of pairs, chats, preferences and prompts, packed and padded,
each a function of (seed, step).

A folder of tokens holds `{train,val}.bin` (or several shards: `train_000.bin` ...), raw little-endian uint16 or uint32,
with `meta.json` and `tokenizer.json` beside them. Without `meta.json` the shards are those of llm.c and modded-nanogpt:
256 int32 (magic 20240520, version 1, number of tokens), then so many uint16 tokens, GPT-2's unless a `tokenizer.json`
says otherwise.

A folder of pairs, which an encoder-decoder learns from, holds `{train,val}.jsonl`, rows {"source": "…", "target": "…"},
and the same two files beside them.

A folder of chats, which a model learns to answer from, holds `{train,val,test}.jsonl`, rows {"messages": [{"role": "…",
"content": "…"} …]} or another shape that `read_chats` knows; a meta.json may be beside them. Preferences, which reward
models and DPO learn from, are in `prefs_{train,val,test}.jsonl` there, or in the former where a folder has no chats:
rows {"prompt": […], "chosen": […], "rejected": […]} or another shape that `read_prefs` knows. Likewise solutions with
labelled steps, which process reward models learn from, are in `stepwise_{train,val,test}.jsonl`: `read_steps`. Such a
file may also be .json or .parquet, compressed, or in shards, and called and placed as on the Hugging Face Hub:
`find_rows`.
"""
import bisect
import contextlib
import difflib
import hashlib
import json
import math
import mmap
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

from chat import NotNested
from errors import UserError
from files import OPENERS
from progress import counted
from rows import (
    SKIP,
    SUFFIXES,
    fraction_of,
    is_file_of_rows,
    read_chats,
    read_labelled,
    read_pairs,
    read_prefs,
    read_prompts,
    read_steps,
    unlearned,
)
from tokenizer import Tokenizer, get_tokenizer
from tools import turn_starts

DTYPES = {'uint16': '<u2', 'uint32': '<u4'}
LLMC_MAGIC, LLMC_HEADER = 20240520, 1024  # the header in bytes
# what names of files call a split
SPLITS = {'train': 'train', 'val': 'val|validation', 'test': 'test', 'unseen': 'unseen'}
# what the files of rows in a folder hold, by their prefix
PREFIXES = {'': 'chats', 'prefs_': 'preferences, which reward.py and dpo.py learn from',
            'stepwise_': 'labelled steps, which reward.py --loss_type=process learns from'}
CHUNK_ROWS = 1024  # chats that are packed together
# what a prepare.py is told to write data/NAME_tools and data/NAME_mixed: rows that call the calculator, all or some
VARIANTS = {'tools': ['--tools=True'], 'mixed': ['--tools=True', '--tool_share=0.3']}

# ----------------------------------------------------------------------------------------------------------------------
# finding a dataset


def find_dataset(name):
    """The folder of a prepared dataset: a path, or data/NAME, which its prepare.py fills now if nobody has yet; or
    data/NAME_tools and NAME_mixed, which that fills with VARIANTS.

    Rows that somebody put into a folder without a prepare.py need no meta.json: where there is one, it says that all
    of them are there.
    UserError where there is no such dataset, or in the words of the prepare.py that fails.
    """
    datasets = Path(__file__).parent / 'data'
    with contextlib.suppress(ValueError):
        datasets = datasets.relative_to(Path.cwd())
    for folder in (Path(name), datasets / name):
        by_hand = any(splits_of(folder, prefix) for prefix in PREFIXES) and not (folder / 'prepare.py').exists()
        if (folder / 'meta.json').exists() or find_shards(folder, 'train') or by_hand:
            return folder
    script, flags = datasets / name / 'prepare.py', []
    stem, _, variant = name.rpartition('_')
    if not script.exists() and variant in VARIANTS:
        script, flags = datasets / stem / 'prepare.py', VARIANTS[variant]
    if not script.exists():
        raise UserError(f'dataset={name!r}: ' + _remedy(name, datasets))
    print(f'preparing {datasets / name} …', flush=True)
    done = subprocess.run([sys.executable, script, *flags], stderr=subprocess.PIPE, encoding='locale')
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f'{script} ended with status {done.returncode}']
        raise UserError(lines[-1].removeprefix('error: '))
    return datasets / name


def _remedy(name, datasets):
    """What is wrong with the name of a dataset that is none, and what to do."""
    path = Path(name)
    if (path / 'prepare.py').exists():
        return f'not prepared yet: run python {shlex.quote(str(path / "prepare.py"))}'
    if name and path.exists():
        stem = re.sub(r'\W+', '_', path.resolve().name.split('.')[0]).strip('_') or 'mine'
        stem += '_text' * (datasets / stem / 'prepare.py').exists()
        return (f'not a prepared dataset; for text: python {datasets / "text/prepare.py"} --input={shlex.quote(name)} '
                f'--name={stem}, then --dataset={stem}; chats are a {" or ".join(SUFFIXES)} file or in a folder')
    names = sorted({path.parent.name for path in datasets.glob('*/*')
                    if path.name in ('prepare.py', 'meta.json', 'train.jsonl')})
    near = difflib.get_close_matches(name, names, 1)
    hint = f'did you mean {near[0]}?' if near else f'give a prepared folder or one of {", ".join(names)}'
    return f'no such dataset, file or folder; {hint}'


def kind_of(folder):
    """What a prepared folder holds: 'tokens', 'pairs' (rows with a tokenizer of their own) or 'chats'."""
    if find_shards(folder, 'train') or not any(splits_of(folder, prefix) for prefix in PREFIXES):
        return 'tokens'
    return 'pairs' if _read_meta(folder, lambda meta: 'tokenizer' in meta) else 'chats'


def splits_of(folder, prefix=''):
    """Of which splits a folder has rows; prefix: one of PREFIXES."""
    return [split for split in SPLITS if _matches(folder, split, prefix)]


def _matches(folder, split, prefix):
    """The files of rows of a split, in order, each as a match: what it is called, (its shard, of how many,) suffix."""
    suffixes = [re.escape(suffix) for suffix in (*SUFFIXES, *OPENERS)]
    name = re.compile(rf'((?:.*/)?{prefix}(?:{SPLITS[split]}))(?:-(\d+)-of-(\d+)(?:-[0-9a-f]+)?)?'
                      rf'((?:{"|".join(suffixes[:len(SUFFIXES)])})(?:{"|".join(suffixes[len(SUFFIXES):])})?)')
    files = [file.relative_to(folder).as_posix() for place in ('*', 'data/*') for file in Path(folder).glob(place)]
    return list(filter(None, map(name.fullmatch, sorted(files))))


def find_rows(folder, split, prefix=''):
    """The files with the rows of a split, in order: train.jsonl, or the Hugging Face Hub's train-00000-of-00002.parquet
    ..., there or in data/ below. UserError where one is missing, or where the rows may be there twice."""
    found = _matches(folder, split, prefix)
    first = found[0]
    for other in found:
        if other.group(1, 3, 4) != first.group(1, 3, 4):
            raise UserError(f'{folder}: {first[0]} and {other[0]} both have the rows of {split}: leave one there')
    if first[2] and [int(match[2]) for match in found] != list(range(int(first[3]))):
        raise UserError(f'{folder}: {len(found)} shards like {first[0]}, not {int(first[3])}: fetch the others')
    return [Path(folder) / match[0] for match in found]


def find_shards(folder, split):
    """The files of a split, in order: train.bin, train_000.bin ..., fineweb_train_000001.bin ..."""
    return [f for f in sorted(Path(folder).glob('*.bin')) if split in re.split('[_.]', f.name)]


def _read_meta(folder, take):
    """What take(content) takes out of a folder's meta.json; None where there is none. UserError for a malformed one."""
    path = Path(folder) / 'meta.json'
    try:
        return take(json.loads(path.read_text(encoding='utf-8')))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f'{path}: malformed ({type(e).__name__}: {e}): {_again(folder)}') from e


def _again(folder):
    return f'run data/{Path(folder).name}/prepare.py again'


# ----------------------------------------------------------------------------------------------------------------------
# running text and pairs


class TokenData:
    """One split of a prepared folder, memory-mapped, as windows of block_size inputs and the targets one token further.

    A window lies inside one shard and may cross documents. In each epoch every shard is cut into windows side by side,
    from an offset of that epoch (so every token becomes a target, in changing company), and the windows of all shards
    come in an order of that epoch, each once. Both are computed from (seed, epoch), see `_shuffle`: nothing is stored,
    however many windows there are, and a resumed run goes on with the window that it would have drawn.

    vocab_size: ids must be below it (default: the tokenizer's). aligned: the windows of every epoch are those of
    `fixed`, from the first token on, so that what is known of each target can be kept. UserError names the file and the
    remedy.
    """

    def __init__(self, folder, split, block_size, seed=1337, vocab_size=None, aligned=False):
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f'{folder}: no such folder: prepare the dataset with data/NAME/prepare.py')
        self.files = find_shards(folder, split)
        if not self.files and (rows := _matches(folder, split, '')):
            raise UserError(f'{folder}: {rows[0][0]} holds rows, not tokens of running text')
        if not self.files:
            raise UserError(f'{folder}: no {split}.bin and no {split}_*.bin: {_again(folder)}')
        tokenizer = folder / 'tokenizer.json'
        meta = _read_meta(folder, lambda meta: (np.dtype(DTYPES[meta['dtype']]), int(meta['splits'][split]['tokens']),
                                                folder / meta['tokenizer']))
        if meta:
            dtype, n_tokens, tokenizer = meta
            size, expected = sum(f.stat().st_size for f in self.files), n_tokens * dtype.itemsize
            if size != expected:
                names = ', '.join(map(str, self.files))
                raise UserError(f'{names}: {size:,} bytes, but meta.json says {expected:,}: {_again(folder)}')
            shards = [_memory_map(f, dtype) for f in self.files]
        else:
            shards = [llmc_shard(f) for f in self.files]
        self.tokenizer = Tokenizer.load(tokenizer) if meta or tokenizer.exists() else get_tokenizer('gpt2')
        self.vocab_size = vocab_size or self.tokenizer.n_vocab
        self.block_size = self.row_tokens = block_size
        self.shards, self.lengths = shards, np.array([len(shard) for shard in shards])
        self.begins = np.cumsum(self.lengths) - self.lengths  # of the shards, in the whole split
        self.n_tokens = int(self.lengths.sum())
        # One window less than a shard holds gives the offset a whole block to vary in.
        self.fit = np.maximum(self.lengths - 1, 0) // block_size
        self.aligned = aligned
        self.drawn = self.fit if aligned else np.maximum(self.lengths // block_size - 1, np.minimum(self.fit, 1))
        self.n_windows = int(self.drawn.sum())
        if not self.n_windows:
            raise UserError(f'{folder}: block_size={block_size} needs {block_size + 1} {split} tokens in a row, not '
                            f'{self.lengths.max()}: lower block_size or prepare more text')
        self.windows = [np.lib.stride_tricks.sliding_window_view(shard, block_size + 1) if fit else None
                        for shard, fit in zip(shards, self.fit, strict=True)]
        self.key = _key_of(seed)

    def batch(self, first, count):
        """Windows first ... first+count-1 of the endless sequence -> (x, y), int64 (count, block_size) each."""
        numbers, key = _epoch_order(np.arange(first, first + count), self.n_windows, self.key)
        shard, i = _locate(numbers, self.drawn)
        if self.aligned:
            return self.read(self.begins[shard] + i * self.block_size)
        spare = self.lengths - self.drawn * self.block_size
        offset = _mix(key ^ shard.astype(np.uint64)) % spare[shard].astype(np.uint64)
        return self.read(self.begins[shard] + offset.astype(np.int64) + i * self.block_size)

    @property
    def targets_in(self):
        """How many targets each window has."""
        return np.full(self.n_windows, self.block_size)

    def targets_at(self, first, count):
        """Of an aligned split: where the targets of `batch` stand among all of `read(fixed(0))`, one after another."""
        numbers, _ = _epoch_order(np.arange(first, first + count), self.n_windows, self.key)
        return (numbers[:, None] * self.block_size + np.arange(self.block_size)).flatten()

    def fingerprint(self):
        """sha256 of all tokens and how they are cut into windows."""
        digest = hashlib.sha256(f'{self.block_size} {self.lengths.tolist()}'.encode())
        for shard in self.shards:
            digest.update(np.ascontiguousarray(shard))
        return digest.hexdigest()

    def n_targets(self, first, count):
        """How many targets `batch` has."""
        return count * self.block_size

    def fixed(self, count):
        """Starts of count windows, evenly spaced side by side, always the same; as many as fit if fewer do or for 0."""
        shard, i = _locate(_evenly_spaced(count, int(self.fit.sum())), self.fit)
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
        path = folder / f'{split}.jsonl'
        meta = _read_meta(folder, lambda meta: (int(meta['splits'][split]['pairs']), folder / meta['tokenizer']))
        if not meta:
            raise UserError(f'{folder}: no meta.json: {_again(folder)}')
        self.n_rows, tokenizer = meta
        self.tokenizer, self.block_size = Tokenizer.load(tokenizer), block_size
        rows = read_pairs(path)
        if len(rows) != self.n_rows:
            raise UserError(f'{path}: {len(rows):,} pairs, but meta.json says {self.n_rows:,}: {_again(folder)}')
        columns = [self.tokenizer.encode_batch([row[key] for row in rows]) for key in ('source', 'target')]
        for row, source, target in zip(rows, *columns, strict=True):
            for what, n in ((f'source has {len(source)} tokens', len(source)),
                            (f'target has {len(target)} tokens and <|endoftext|>', len(target) + 1)):
                if n > block_size:
                    raise UserError(f"{row['where']}: its {what}, more than block_size={block_size}: raise that or "
                                    'shorten the row')
        # one array each for all sources and targets, and where each begins and ends
        self.ids = [np.fromiter((i for text in column for i in text), np.int32) for column in columns]
        self.ends = [np.cumsum([0, *map(len, column)]) for column in columns]
        self.n_tokens = len(self.ids[1]) + self.n_rows
        self.row_tokens = self.n_tokens / self.n_rows
        self.key = _key_of(seed)

    def batch(self, first, count):
        """Rows first ... first+count-1 of the endless sequence, see `read`."""
        return self.read(self.rows(first, count))

    def rows(self, first, count):
        """The numbers of those rows in the file."""
        return _epoch_order(np.arange(first, first + count), self.n_rows, self.key)[0]

    def fixed(self, count):
        """The numbers of count rows, evenly spaced, always the same; all of them if there are fewer or for 0."""
        return _evenly_spaced(count, self.n_rows)

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


def _epoch_order(places, n, key):
    """The items at these places of an endless sequence in which each epoch has all n in an order of its own -> their
    numbers, int64, and the keys of their epochs, uint64, both of the shape of places."""
    epoch, i = np.divmod(places, n)
    keys = _mix(key + epoch.astype(np.uint64))
    return _shuffle(i, n, keys), keys


def _evenly_spaced(count, n):
    """count numbers below n, always the same; all of them if there are fewer or for 0."""
    count = min(count, n) or n
    return np.arange(count) * n // count


def _key_of(seed, purpose=0):
    """What a random order is computed from: one key for each seed and purpose, uint64 (1,)."""
    return _mix(np.array([seed % (1 << 64) ^ purpose], np.uint64))


def _mix(x):
    """uint64 array -> pseudo-random uint64 array: a step of SplitMix64 (Steele et al., doi:10.1145/2714064.2660195)."""
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


# ----------------------------------------------------------------------------------------------------------------------
# chats


def load_chats(dataset, split, strict=True, val_fraction=0.1):
    """A split of a dataset -> (rows, skipped), see `read_chats` in rows.py.

    dataset: what `find_dataset` finds, a folder with {split}.jsonl or what `find_rows` takes for it; or a path to one
    file of rows. Of a file, and of shards of train without any of val, 'val' is the val_fraction of the prompts (all
    before the last message) that have the lowest hashes, one at least, and 'train' the others: no prompt is in both.
    UserError names a split that is not there.
    """
    return _load(dataset, split, read_chats, strict, val_fraction)


def load_prefs(dataset, split, strict=True, val_fraction=0.1):
    """As `load_chats`, of preferences: see `read_prefs`; of a folder prefs_{split}.jsonl, or else {split}.jsonl."""
    return _load(dataset, split, read_prefs, strict, val_fraction, 'prefs_')


def load_labelled(dataset, split, strict=True, val_fraction=0.1):
    """As `load_prefs`, of single answers that are good or bad: see `read_labelled`."""
    return _load(dataset, split, read_labelled, strict, val_fraction, 'prefs_')


def load_steps(dataset, split, strict=True, val_fraction=0.1):
    """As `load_prefs`, of solutions with labelled steps: see `read_steps`; stepwise_{split}.jsonl of a folder."""
    return _load(dataset, split, read_steps, strict, val_fraction, 'stepwise_')


def load_prompts(dataset, split, strict=True, val_fraction=0.1):
    """As `load_chats`, of prompts: see `read_prompts`."""
    return _load(dataset, split, read_prompts, strict, val_fraction)


def _load(dataset, split, read, strict, val_fraction, prefix=''):
    path = Path(dataset)
    if is_file_of_rows(path):
        if split not in ('train', 'val'):
            raise UserError(f'{path}: a single file has only train and val: make a folder with {prefix}{split}.jsonl')
        return _one_of_two(path, split, read(path, strict), val_fraction, bool(prefix))
    folder, prefs, what = find_dataset(dataset), bool(prefix), PREFIXES[prefix].partition(',')[0]
    if (kind := kind_of(folder)) != 'chats':
        found = {'tokens': 'running text', 'pairs': 'pairs of source and target'}[kind]
        raise UserError(f'{folder} holds {found}, which train.py learns from, not {what}')
    if prefix and not splits_of(folder, prefix):
        if (folder / 'prepare.py').exists() or folder.parent.resolve() == Path(__file__).resolve().parent / 'data':
            columns = {'prefs_': '"chosen" and "rejected"', 'stepwise_': '"completions" and "labels"'}[prefix]
            raise UserError(f'{folder} has no {what}: prepare it again, from rows with {columns}')
        prefix = ''
    there = splits_of(folder, prefix)
    if not there:
        held = [rows for other, rows in PREFIXES.items() if splits_of(folder, other)]
        raise UserError(f'{folder} holds {" and ".join(held)}, not {what}')
    shards = any(match[2] for match in _matches(folder, 'train', prefix))
    if split in ('train', 'val') and 'val' not in there and shards:
        return _one_of_two(folder, split, read(find_rows(folder, 'train', prefix), strict), val_fraction, prefs)
    if split not in there:
        raise UserError(f'{folder}: no {prefix}{split}.jsonl, only {" and ".join(there)}: add it or take of these')
    return read(find_rows(folder, split, prefix), strict)


def _one_of_two(path, split, found, val_fraction, prefs):
    """Of the rows of a file, or of shards, that are for training and validation, those of a split."""
    rows, skipped = found
    hashes = [fraction_of(json.dumps(row['prompt'] if prefs else row['messages'][:-1])) for row in rows]
    ordered = sorted(set(hashes))
    if len(ordered) < 2:
        raise UserError(f'{path}: all rows have one prompt, so none can be held out: add others')
    first = ordered[min(max(1, round(val_fraction * len(ordered))), len(ordered) - 1)]  # of those to learn from
    return [row for row, h in zip(rows, hashes, strict=True) if (h < first) == (split == 'val')], skipped


class ChatData:
    """One split of chats, tokenised, as rows in which only the assistant's tokens count (arXiv:2203.02155).

    rows: those of `load_chats`. A row of tokens t_0 … t_n has the inputs t_0 … t_n-1 and the targets t_1 … t_n, which
    are -100 where the assistant did not say them, unless train_on_prompt. too_long: rows with more than block_size
    inputs are left out ('drop'), or lose tokens at their beginning ('left') or end ('right').

    pack: an item of `batch` is a block, several rows side by side in block_size inputs (arXiv:2404.10830), else a row.
    Each epoch has every row once, in an order computed from (seed, epoch) as those of TokenData, unless `pace` says
    otherwise. For blocks this sequence of rows is cut into chunks, each is packed on its own, and its blocks come in an
    order computed from (seed, chunk). A resumed run goes on with the item that it would have drawn.

    rows_kept: the rows that are in, by number; dropped: how many are not ('too_long', 'nothing_to_learn': no target is
    left) and how many of those in are cut ('truncated'); lengths: inputs of each row, int64 (n_rows,); n_tokens: the
    targets that count, of all rows; row_tokens: of a row, in the mean.

    mask_history: only the last answer of a row counts. calls: results of the calculator's calls do not, see
    `Tokenizer.chat_ids`. strict: a row that the chat template refuses raises UserError, else it is left out
    ('refused_by_template'). UserError also where no row is left and where rows are templated already.
    """
    longest, limit = 0, '--max_length'  # tokens of the longest row that was left out; the knob that has rows left out

    def __init__(self, rows, tokenizer, block_size, seed=1337, too_long='drop', train_on_prompt=False, pack=False,
                 mask_history=False, calls=True, strict=True):
        self.tokenizer, self.block_size, self.pack = tokenizer, block_size, pack
        self.rows_kept, self.dropped = [], {'too_long': 0, 'truncated': 0, 'nothing_to_learn': 0}
        ids, counts = [], []
        for row, tokens, mask in self._tokenised(self._untemplated(rows), mask_history, calls, strict):
            cut = len(tokens) > block_size + 1
            if cut and too_long == 'drop':
                self._leave_out(len(tokens) - 1)
                continue
            kept = slice(-block_size - 1, None) if too_long == 'left' else slice(block_size + 1)
            tokens, mask = np.array(tokens[kept], np.int32), np.array(mask[kept], bool) | train_on_prompt
            if not mask[1:].any():
                self.dropped['nothing_to_learn'] += 1
                continue
            self.dropped['truncated'] += cut
            self.rows_kept.append(row)
            ids.append(tokens)
            counts.append(mask)
        self._take(ids, counts, rows, seed)

    def _tokenised(self, rows, mask_history, calls, strict):
        """Yields rows, their ids and masks. A row whose earlier answers the chat template renders otherwise than they
        are generated becomes several ('split'), one for each answer, which end with it."""
        for row in rows:
            messages = unlearned(row['messages'][:-1]) + row['messages'][-1:] if mask_history else row['messages']
            try:
                found = self._tokens(row, strict, lambda m=messages: self.tokenizer.chat_ids(m, calls=calls), True)
                parts = [(row, found)]
            except NotNested:
                ends = [i for i, m in enumerate(messages) if m['role'] == 'assistant' and m.get('weight') != 0]
                self.dropped['split'] = self.dropped.get('split', 0) + 1
                parts = []
                for i in ends:
                    # what is right of the row is right of its last answer
                    part = row if i == len(messages) - 1 else {'messages': messages[:i + 1], 'where': row['where']}
                    answer = unlearned(messages[:i]) + [messages[i]]
                    found = self._tokens(row, strict, lambda m=answer: self.tokenizer.chat_ids(m, calls=calls))
                    parts.append((part, found))
            yield from ((part, *found) for part, found in parts if found)

    def _tokens(self, row, strict, make, splits=False):
        """What make() gives; where the chat template refuses the row, None, or with strict UserError that names it.
        splits: NotNested passes."""
        try:
            return make()
        except UserError as e:
            if splits and isinstance(e, NotNested):
                raise
            if strict:
                raise UserError(f'{row["where"]}: {e}; {SKIP}') from None
            self.dropped['refused_by_template'] = self.dropped.get('refused_by_template', 0) + 1

    def _leave_out(self, length):
        """Counts a row of so many tokens as too long."""
        self.dropped['too_long'] += 1
        self.longest = max(self.longest, length)

    def _untemplated(self, rows):
        """Yields the rows; UserError where some have the markers of a chat template, which would become letters."""
        own = self.tokenizer.chat.writes()
        templated = [(row['where'], text) for row in rows if (text := templated_text(row, own))]
        if templated:
            where, text = templated[0]
            raise UserError(f'{where}: {text!r:.60} has the markers of a chat template, as {len(templated):,} of '
                            f'{len(rows):,} rows have: they would be learned as letters: take them out, and give '
                            'several turns as "messages"')
        return counted(rows, 'tokenising', 'rows')

    def _take(self, ids, counts, rows, seed, each=1):
        """Keeps tokens and whether they count, of `each` texts for a row; of which rows, for the message."""
        self.n_rows = len(ids) // each
        if not ids:
            raise UserError(f'{rows[0]["where"] if rows else "no rows"} …: none of {len(rows):,} rows has an answer '
                            f'within {self.block_size} tokens: allow longer ones or give shorter ones')
        # one array each for the tokens of all texts and whether they count, and where each begins and ends
        self.ids, self.counts = np.concatenate(ids), np.concatenate(counts)
        self.ends = np.cumsum([0, *map(len, ids)])
        self.lengths = np.diff(self.ends) - 1
        self.targets_in = np.array([int(mask[1:].sum()) for mask in counts])
        self.n_tokens = int(self.targets_in.sum())
        self.row_tokens = self.n_tokens / self.n_rows
        self.key, self.pace_key, self.chunk_key = (_key_of(seed, purpose) for purpose in (0, 1 << 62, 1 << 63))
        self.set_curriculum(np.zeros(self.n_rows), 0)

    def set_curriculum(self, difficulty, count, start=0.2):
        """From now on the first count rows of the sequence are drawn from easy ones, more and more of them: a
        competence-based curriculum (arXiv:1903.09848). Ordinary epochs follow.

        Row i comes from the easiest min(1, sqrt(i (1 - start^2) / count + start^2)) of all, one as likely as another.
        difficulty: of each row, float (n_rows,); of two that are as hard, the one with the lower number is easier.
        """
        self.easiest, self.count, self.start = np.argsort(difficulty, kind='stable'), count, start
        self.chunk_rows = min(CHUNK_ROWS, self.n_rows)
        self.block_ends, self.chunks = [0], {}  # how many blocks the chunks have up to each; the blocks of the last few

    def batch(self, first, count):
        """Items first ... first+count-1 of the endless sequence, see `read` and, of blocks, `read_packed`."""
        return self.read_packed(self.blocks(first, count)) if self.pack else self.read(self.rows(first, count))

    def rows(self, first, count):
        """The numbers of rows first ... first+count-1 of the endless sequence, int64 (count,)."""
        i = np.arange(first, first + count)
        rows, _ = _epoch_order(np.maximum(i - self.count, 0), self.n_rows, self.key)
        paced = i[i < self.count]
        if len(paced):
            share = np.minimum(1, np.sqrt(paced * ((1 - self.start ** 2) / self.count) + self.start ** 2))
            easy = np.maximum(1, share * self.n_rows).astype(np.uint64)
            rows[:len(paced)] = self.easiest[_mix(self.pace_key + paced.astype(np.uint64)) % easy]
        return rows

    def blocks(self, first, count):
        """The numbers of rows in blocks first ... first+count-1 of the endless sequence, a list for each."""
        while self.block_ends[-1] < first + count:
            self.block_ends.append(self.block_ends[-1] + len(self._chunk(len(self.block_ends) - 1)))
        chunks = [bisect.bisect_right(self.block_ends, number) - 1 for number in range(first, first + count)]
        return [self._chunk(chunk)[number - self.block_ends[chunk]] for number, chunk in enumerate(chunks, first)]

    def _chunk(self, chunk):
        """The blocks that a chunk of the sequence of rows is packed into, in their order."""
        if chunk not in self.chunks:
            rows = self.rows(chunk * self.chunk_rows, self.chunk_rows)
            blocks = [rows[block].tolist() for block in best_fit(self.lengths[rows], self.block_size)]
            key = _mix(np.repeat(self.chunk_key + np.uint64(chunk), len(blocks)))
            order = _shuffle(np.arange(len(blocks)), len(blocks), key)
            self.chunks = dict([*self.chunks.items()][-7:]) | {chunk: [blocks[i] for i in order]}
        return self.chunks[chunk]

    def n_targets(self, first, count):
        """How many targets that count `batch` has."""
        return int(self.targets_in[self._rows_of(first, count)].sum())

    def targets_at(self, first, count):
        """Where the targets of `batch` that count stand among those of all rows, one after another."""
        ends = np.cumsum(self.targets_in)
        return np.concatenate([np.arange(ends[row] - self.targets_in[row], ends[row])
                               for row in self._rows_of(first, count)])

    def _rows_of(self, first, count):
        """The numbers of all rows in `batch`, in the order in which they stand there."""
        return sum(self.blocks(first, count), []) if self.pack else self.rows(first, count)

    def fingerprint(self):
        """sha256 of all texts, and of what counts in them."""
        return hashlib.sha256(b''.join(x.tobytes() for x in (self.ids, self.ends, self.counts))).hexdigest()

    def fixed(self, count):
        """The numbers of count rows, evenly spaced, always the same; all of them if there are fewer or for 0."""
        return _evenly_spaced(count, self.n_rows)

    def read(self, rows):
        """Rows of these numbers -> idx and targets, int64 (B, T), padded with <|endoftext|> and -100.

        T is that of the longest or a little more, a multiple of 32 where block_size allows.
        """
        return self.read_packed([[row] for row in rows])[:2]

    def read_packed(self, blocks):
        """Blocks, lists of row numbers -> idx, targets, positions, segments, int64 (B, T), padded as in `read`.

        positions count from 0 in each conversation; segments number those of a block 1, 2, …, and are 0 on padding.
        """
        longest = max(int(self.lengths[block].sum()) for block in blocks)
        T = padded_width(longest, self.block_size)
        idx, targets = np.full((len(blocks), T), self.tokenizer.eot), np.full((len(blocks), T), -100)
        positions, segments = np.zeros((len(blocks), T), np.int64), np.zeros((len(blocks), T), np.int64)
        for b, block in enumerate(blocks):
            end = 0
            for number, row in enumerate(block, 1):
                tokens, counts = (x[self.ends[row]:self.ends[row + 1]] for x in (self.ids, self.counts))
                begin, end = end, end + len(tokens) - 1
                idx[b, begin:end] = tokens[:-1]
                targets[b, begin:end] = np.where(counts[1:], tokens[1:], -100)
                positions[b, begin:end] = np.arange(end - begin)
                segments[b, begin:end] = number
        return idx, targets, positions, segments

    def prompt(self, row):
        """The ids of a row's 'prompt', or else all but its last message, and the header of the answer."""
        row = self.rows_kept[row]
        return self.tokenizer.chat_ids(row.get('prompt', row['messages'][:-1]), generate=True)[0]

    def text(self, ids):
        """The text of an answer's ids, of its last turn where it has several, without what ends it."""
        ids = ids[turn_starts(self.tokenizer, ids)[-1]:]
        ends = self.tokenizer.turn_ids
        return self.tokenizer.decode([i for i in ids if i not in ends])

    def transcript(self, ids):
        """The text of an answer's ids with all its turns, without what ends the last one."""
        return self.tokenizer.decode(ids[:-1] if ids[-1:] and ids[-1] in self.tokenizer.turn_ids else ids)

    def left_out(self, skipped=()):
        """In words, how many rows of a file are not in, or cut, and why, and which of their keys are not used; '' if
        none; skipped: see `read_chats`."""
        longest = f' (up to {self.longest:,} tokens, {self.block_size:,} fit: see {self.limit})'
        lost = [f'{len(skipped):,} malformed'] * bool(skipped) + [
            f'{n:,} {what.replace("_", " ")}' + longest * (what == 'too_long') for what, n in self.dropped.items()
            if n and what not in ('truncated', 'split')]
        words = [f'left out: {", ".join(lost)}'] * bool(lost)
        words += [f'truncated: {self.dropped["truncated"]:,}'] * bool(self.dropped['truncated'])
        if 'split' in self.dropped:
            words.append(f'split, a row for each answer: {self.dropped["split"]:,}')
        unused = getattr(skipped, 'unused', {})
        words += ['not used: ' + ', '.join(f'{key} ({n:,})' for key, n in unused.items())] * bool(unused)
        words += ['malformed are' + ', for example,' * (len(skipped) > 10)] * bool(skipped)
        return '\n  '.join(['; '.join([f'{self.n_rows:,} rows', *words]), *skipped[:10]]) if words else ''


class PrefData(ChatData):
    """One split of preferences, tokenised: texts of a prompt and an answer, of pair i chosen 2 i and rejected 2 i + 1.

    rows: those of `load_prefs`; each also gets 'messages', the prompt and its first answer to it. A text ends with the
    end of the assistant's turn; answers count, prompts do not. Of texts of more than block_size tokens the prompt loses
    its beginning, as much for both answers ('truncated'); a pair whose answers do not fit whole is left out
    ('too_long'). strip: see `answered`. Otherwise as ChatData: `rows` and `fixed` give pairs, `read` takes texts.

    labels: of each text, whether it is the chosen one, bool.
    """
    answers, load = ('chosen', 'rejected'), staticmethod(load_prefs)  # the keys of a row's answers

    def __init__(self, rows, tokenizer, block_size, seed=1337, calls=True, strict=True, strip=False):
        self.tokenizer, self.block_size, self.pack = tokenizer, block_size, False
        self.rows_kept, self.dropped = [], {'too_long': 0, 'truncated': 0}
        ids, counts = [], []
        for row in self._untemplated(rows):
            pair = self._tokens(row, strict, lambda row=row: [
                answered(tokenizer, row['prompt'], row[key], calls=calls, strip=strip) for key in self.answers])
            if pair is None:
                continue
            cut = max(0, max(len(tokens) for tokens, _ in pair) - block_size)
            if any(cut >= mask.argmax() for _, mask in pair):
                self._leave_out(cut + block_size)
                continue
            self.dropped['truncated'] += cut > 0
            answer = row[self.answers[0]]
            first = next(i for i, m in enumerate(answer, 1) if m['role'] == 'assistant')
            self.rows_kept.append(row | {'messages': row['prompt'] + answer[:first]})
            ids += [tokens[cut:] for tokens, _ in pair]
            counts += [mask[cut:] for _, mask in pair]
        self._take(ids, counts, rows, seed, each=len(self.answers))
        self.labels = self._labels()

    def _labels(self):
        return np.arange(2 * self.n_rows) % 2 == 0

    def texts(self, pairs):
        """The numbers of the texts of pairs: of all chosen answers, then of all rejected ones, int64 (2 n,)."""
        each = len(self.answers)
        return np.concatenate([each * np.asarray(pairs) + k for k in range(each)])

    def example(self, text):
        """The ids of a text, and which of them are the answer's: two arrays."""
        where = slice(self.ends[text], self.ends[text + 1])
        return self.ids[where], self.counts[where]


class LabelledData(PrefData):
    """As PrefData, of single answers, the rows of `load_labelled`: text i is that of row i."""
    answers, load = ('completion',), staticmethod(load_labelled)

    def _labels(self):
        return np.array([row['label'] for row in self.rows_kept])


class StepData(PrefData):
    """As PrefData, of solutions with labelled steps, the rows of `load_steps`: text i is that of row i."""
    answers, load = ('completion',), staticmethod(load_steps)


def prefs_of(dataset, split, tokenizer, length, seed, strict, val_fraction, say, calls=True, kind=PrefData, strip=False,
             force=None):
    """A split of a dataset as PrefData, LabelledData or StepData, with the tools of a Forcing; say(text) is told what
    was left out or cut."""
    rows, skipped = kind.load(dataset, split, strict, val_fraction)
    data = kind(force.tools.rows(rows) if force else rows, tokenizer, length, seed, calls, strict, strip)
    if lost := data.left_out(skipped):
        say(f'{dataset}, {split}: {lost}')
    return data


class PromptData(ChatData):
    """One split of prompts, tokenised, up to the header of the answer, which has room for max_new_tokens in block_size.

    rows: those of `load_prompts`. A prompt that leaves less room is left out ('too_long'). Otherwise as ChatData:
    `rows` gives the endless sequence, `fixed` an even choice, and `prompt` the ids.
    """
    limit = '--max_new_tokens'

    def __init__(self, rows, tokenizer, block_size, max_new_tokens, seed=1337, strict=True):
        self.tokenizer, self.block_size, self.pack = tokenizer, block_size, False
        self.rows_kept, self.dropped, ids = [], {'too_long': 0, 'truncated': 0}, []
        for row in self._untemplated(rows):
            found = self._tokens(row, strict, lambda row=row: tokenizer.chat_ids(row['prompt'], generate=True))
            if found is None:
                continue
            tokens = np.array(found[0], np.int32)
            if len(tokens) + max_new_tokens > block_size:
                self._leave_out(len(tokens) + max_new_tokens)
                continue
            self.rows_kept.append(row)
            ids.append(tokens)
        if not ids:
            raise UserError(f'{rows[0]["where"]} …: none of {len(rows):,} prompts leaves room for max_new_tokens='
                            f'{max_new_tokens} in block_size={block_size}: lower it or shorten them')
        self._take(ids, [np.ones(len(tokens), bool) for tokens in ids], rows, seed)

    def prompt(self, row):
        return self.ids[self.ends[row]:self.ends[row + 1]].tolist()


def real_tokens(targets, segments=None):
    """How many tokens of a batch (B, T) are no padding: targets, -100 where none is due; segments of packed rows."""
    if segments is not None:
        return int((segments > 0).sum())
    counts = targets != -100  # a row ends with its last target
    return int((counts.shape[1] - counts[:, ::-1].argmax(1)).sum())


def padded_width(longest, block_size):
    """The width of a batch: few shapes, since a CPU's kernels are made anew for each."""
    return min(-(-longest // 32) * 32, max(longest, block_size))


def answered(tokenizer, prompt, answer, block_size=0, calls=True, strip=False):
    """A prompt, messages, and an answer to it, messages or the assistant's text, to the end of its turn -> ids, int32
    (n,), and which of them are the answer's, bool (n,); the last block_size of them, 0 = all.

    strip: without the blanks at its end, as a reward model reads it: a blank that no policy writes is unlikely, which
    score_likelihood would count, and says nothing about an answer.
    """
    answer = [{'role': 'assistant', 'content': answer}] if isinstance(answer, str) else answer
    if strip:
        answer = [*answer[:-1], answer[-1] | {'content': answer[-1]['content'].rstrip()}]
    tokens, mask = tokenizer.chat_ids([*unlearned(prompt), *answer], calls=calls)
    kept = slice(-block_size or None, None)
    tokens, mask = np.array(tokens, np.int32), np.array(mask, bool)
    end = int(mask.nonzero()[0][-1]) + 1  # ChatML has a newline after the end of a turn
    return tokens[:end][kept], mask[:end][kept]


# of well-known chat templates; what the tokenizer's own writes is looked for, too
MARKERS = {'<|im_start|>', '<|im_end|>', '<|start_header_id|>', '<|eot_id|>', '<start_of_turn>', '<end_of_turn>',
           '[INST]', '[/INST]', '<|endoftext|>', '<|begin_of_text|>'}


def templated_text(row, own):
    """The first text of a row that has been through a chat template, or '': one that begins or ends with a marker, of
    MARKERS or own, or has two of them."""
    for m in [m for key in ('messages', 'prompt', 'chosen', 'rejected', 'completion') for m in row.get(key, [])]:
        found = [marker for marker in MARKERS | own if marker in m['content']]
        text = m['content'].strip() if found else ''
        if len(found) > 1 or any(text.startswith(marker) or text.endswith(marker) for marker in found):
            return text
    return ''


def pad_texts(texts, block_size):
    """[(ids, which of them count)] -> idx, int64 (B, T), padded with zeros on the right, which are real, and which
    count, bool (B, T) both.

    T is that of the longest or a little more, a multiple of 32 where block_size allows.
    """
    lengths = np.array([len(ids) for ids, _ in texts])
    real = np.arange(padded_width(int(lengths.max()), block_size)) < lengths[:, None]
    idx, counts = np.zeros(real.shape, np.int64), np.zeros(real.shape, bool)
    idx[real], counts[real] = (np.concatenate(parts) for parts in zip(*texts, strict=True))
    return idx, real, counts


def best_fit(lengths, size):
    """Lists of numbers of lengths that add up to at most size each, few lists: best-fit decreasing (arXiv:2404.10830).

    The longest comes first and goes where it leaves the least room, into a new list where it fits nowhere.
    """
    blocks, rooms = [], []  # rooms: (what is left, number of the block), in order
    for i in np.argsort(-lengths, kind='stable').tolist():
        length = int(lengths[i])
        place = bisect.bisect_left(rooms, (length,))
        room, block = rooms.pop(place) if place < len(rooms) else (size, len(blocks))
        if block == len(blocks):
            blocks.append([])
        blocks[block].append(i)
        bisect.insort(rooms, (room - length, block))
    return blocks
