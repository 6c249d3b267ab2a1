"""
Any text -> ../NAME/train.bin and val.bin.

Inputs are text files (UTF-8), folders of them (with their subfolders, in the order of their names, hidden files left
out) and .jsonl files with a `text` field in every row. A file or a row is a document, and <|endoftext|> ends it. Text
is read in pieces, so it may be larger than memory. Validation is every tenth document (see val_fraction) where there
are so many, else the end of the text.

    python data/text/prepare.py --input=BOOK.txt --name=book --tokenizer=chars
    python data/text/prepare.py --input=notes/ --input=more.jsonl --name=notes --vocab_size=8192
"""
import json
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import runtime

from preparation import write_dataset
from tokenizer import UserError, get_tokenizer

input = []  # text files, folders of them, .jsonl files; may be given several times
name = ''  # the dataset is written to data/NAME/
tokenizer = 'bpe'  # bytes, chars, bpe (trained on the training part), a tiktoken encoding, or a model's folder
vocab_size = 4096  # of bpe, special tokens included
val_fraction = 0.1  # share of the documents, or of the bytes, for validation

PIECE = 1 << 17  # bytes read at a time
# Ends of lines and of words where no split pattern of GPT-2 or its successors joins what meets there.
LINE_END, WORD_END = re.compile(rb'\S\r?\n(?=\w)'), re.compile(rb'\S(?= \S)')


def find_files(paths):
    """All files below paths; UserError for one that is missing, empty or not to be read."""
    files = []
    for path in map(Path, paths):
        inside = path.rglob('*') if path.is_dir() else [path]
        found = sorted(f for f in inside if f.is_file() and not any(p[0] == '.' for p in f.relative_to(path).parts))
        if not found:
            raise UserError(f'{path}: ' + ('no files in this folder' if path.is_dir() else 'no such file or folder'))
        files += found
    for file in files:
        if not os.access(file, os.R_OK):
            raise UserError(f'{file}: no permission to read it')
        if not file.stat().st_size:
            raise UserError(f'{file}: the file is empty: leave it out or put text into it')
    return files


def read_rows(path):
    """Yields (byte offset of its end, text) for every row of a JSONL file that has text."""
    offset = 0
    with open(path, 'rb') as f:
        for number, line in enumerate(f, 1):
            offset += len(line)
            if line.strip():
                try:
                    text = json.loads(line)['text']
                    text.encode()
                except (ValueError, KeyError, TypeError, AttributeError) as e:
                    raise UserError(f'{path}, line {number}: not a JSON object with a "text" of UTF-8 text '
                                    f'({type(e).__name__}: {e})') from e
                if text:
                    yield offset, text


def read_pieces(path, begin, end):
    """Yields the text between two bytes of a file, a piece at a time, cut where it does not matter to a tokenizer."""
    with open(path, 'rb') as f:
        f.seek(begin)
        rest = b''
        while begin < end:
            rest += f.read(min(PIECE, end - begin - len(rest)))
            cut = find_cut(rest) if begin + len(rest) < end else len(rest)
            piece, rest = rest[:cut], rest[cut:]
            if b'\0' in piece:
                raise UserError(f'{path}: a NUL at byte {begin + piece.index(0)}: it is not UTF-8 text: convert it')
            try:
                yield piece.decode().replace('\r\n', '\n').replace('\ufeff', '')
            except UnicodeDecodeError as e:
                raise UserError(f'{path}: byte {begin + e.start} is not UTF-8: convert the file to UTF-8') from None
            begin += cut


def find_cut(data):
    """Where to cut data: near its end, after a line, else after a word, else before its last character."""
    match = LINE_END.search(data, len(data) * 7 // 8) or WORD_END.search(data, len(data) * 7 // 8)
    if match:
        return match.end()
    cut = len(data) - 1
    while cut > 1 and data[cut] & 0xC0 == 0x80:  # a byte that continues a character
        cut -= 1
    return cut


def find_boundary(path, place):
    """The first end of a line from a place in a file on, else the next character; in bytes."""
    with open(path, 'rb') as f:
        f.seek(min(max(place, 0), path.stat().st_size))
        data = f.read(PIECE) if place > 0 else b''
        match = re.search(rb'\n(?=[^\n])', data)
        return f.tell() - len(data) + (match.end() if match else re.search(rb'[^\x80-\xbf]|$', data).start())


def documents(files, split, by_document, boundary):
    """Yields the documents of a split: a str (a row) or the pieces of one (a file).

    by_document: the val_fraction of the documents, evenly spaced, is for validation; else what lies beyond boundary, a
    place in all files one after another.
    """
    index = offset = 0
    for file in files:
        size = file.stat().st_size
        if file.suffix == '.jsonl':
            for end, text in read_rows(file):
                val = is_val(index) if by_document else offset + end > boundary
                if val == (split == 'val'):
                    yield text
                index += 1
        else:
            cut = (0 if is_val(index) else size) if by_document else find_boundary(file, boundary - offset)
            begin, end = (cut, size) if split == 'val' else (0, cut)
            if begin < end:
                yield read_pieces(file, begin, end)
            index += 1
        offset += size


def is_val(index):
    return int((index + 1) * val_fraction) > int(index * val_fraction)


def main():
    runtime.configure(globals())
    folder = Path(__file__).resolve().parents[1] / name
    if not input:
        raise UserError('input: nothing to read: give --input=FILE.txt, --input=FOLDER or --input=ROWS.jsonl')
    if not re.fullmatch(r'\w[\w.-]*', name):
        raise UserError(f'name={name!r}: give --name=NAME, the plain name of a folder to be written in data/')
    if (folder / 'prepare.py').exists():
        raise UserError(f'name={name}: data/{name}/ belongs to its own prepare.py: choose another name')
    if not 0 < val_fraction < 1:
        raise UserError(f'val_fraction={val_fraction}: give a share between 0 and 1')
    files = find_files(input)
    count = sum(1 for file in files for _ in (read_rows(file) if file.suffix == '.jsonl' else [file]))
    total = sum(file.stat().st_size for file in files)

    def split_documents(split):
        return documents(files, split, int(count * val_fraction) > 0, int(total * (1 - val_fraction)))

    texts = (text for document in split_documents('train')
             for text in ([document] if isinstance(document, str) else document))
    encoder = get_tokenizer(tokenizer, texts, vocab_size)
    splits = {split: split_documents(split) for split in ('train', 'val')}
    write_dataset(folder, encoder, splits, f'{", ".join(input)}, val_fraction={val_fraction}')


if __name__ == '__main__':
    runtime.cli(main)
