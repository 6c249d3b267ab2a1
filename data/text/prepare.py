r"""
Any text -> ../NAME/train.bin and val.bin.

Inputs are files, and folders of them (with their subfolders, in the order of their names, hidden files left out):

    .txt .md .py .html …    running text in UTF-8: any name that is not in this table
    .jsonl .ndjson .json    rows, one on each line or all in a list, whose text is under text_key
    .csv .tsv .parquet      rows whose text is in the column text_key; .parquet needs pyarrow
    .gz .bz2 .xz .zst       each of these compressed; .zst needs Python 3.14 or backports.zstd

A file of running text is a document, and so is a row. A separator inside ends one, too; the blanks and newlines around
it belong to it. <|endoftext|> ends each document; one without text is left out. Windows' \r\n and old Macs' \r become
\n, and byte order marks go. What is no text (a picture, a .pdf, an empty file) is refused; in a folder it is left out
and named. All but a list in .json is read in pieces, so it may be larger than memory.

Validation is every tenth document (see val_fraction) where there are so many, else the end of the text.

    python data/text/prepare.py --input=BOOK.txt --name=book --tokenizer=chars
    python data/text/prepare.py --input=notes/ --input=more.jsonl.gz --name=notes --vocab_size=8192
"""
import codecs
import io
import json
import os
import re
import sys
from collections import Counter
from itertools import groupby
from operator import itemgetter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import runtime

from files import csv_rows, format_of, lines_of, opened, parquet_rows
from preparation import write_dataset
from tokenizer import UserError, get_tokenizer

input = []  # files and folders of them, see above; may be given several times
name = ''  # the dataset is written to data/NAME/
text_key = 'text'  # the key, or column, of a row's text; empty: .json, .csv and so on are running text, too
separator = '<|endoftext|>'  # what stands between two documents of one file; empty: nothing does
tokenizer = 'bpe'  # bytes, chars, bpe (trained on the training part), a tiktoken encoding, or a model's folder
vocab_size = 4096  # of bpe, special tokens included
val_fraction = 0.1  # share of the documents, or of the characters, for validation
strict = True  # stop at a row without a text and, in a folder, at a file in another encoding; False: leave such out

PIECE = 1 << 17  # characters that are tokenised at a time
BLANK = ' \t\n'
# Ends of lines and of words where no split pattern of GPT-2 or its successors joins what meets there.
LINE_END, WORD_END = re.compile(r'\S\n(?=\w)'), re.compile(r'\S(?= \S)')
NOT_TEXT = {f'.{suffix}' for suffix in '''
    pdf ps djvu epub mobi doc docx rtf odt xls xlsx ods ppt pptx odp pages ipynb
    svg png jpg jpeg gif bmp tif tiff webp heic ico psd mp3 wav flac ogg m4a mp4 mkv mov avi webm ttf otf woff woff2
    zip tar tgz tbz2 txz 7z rar lz4 br z jar whl iso dmg exe dll so dylib o a class pyc
    bin npy npz pkl pickle pt pth safetensors gguf onnx h5 arrow feather orc avro db sqlite sqlite3'''.split()}


# ----------------------------------------------------------------------------------------------------------------------
# files

def find_files(paths):
    """All files below paths -> those to read and, of folders, those that are no text, which are left out.

    UserError for a path that is missing or not to be read, for a file that is no text, and where no text is found.
    """
    files, left_out = [], []
    for path in map(Path, paths):
        inside = path.rglob('*') if path.is_dir() else [path]
        found = sorted(f for f in inside if f.is_file() and not any(p[0] == '.' for p in f.relative_to(path).parts))
        if not found:
            raise UserError(f'{path}: ' + ('no files in this folder' if path.is_dir() else 'no such file or folder'))
        for file in found:
            if not os.access(file, os.R_OK):
                raise UserError(f'{file}: no permission to read it')
            why = why_no_text(file)
            if why and not path.is_dir():
                raise UserError(f'{file}: {why}')
            (left_out if why else files).append(file)
    if not files:
        raise UserError(f'{", ".join(paths)}: no text among {len(left_out):,} files; the first is {left_out[0]}, '
                        f'{why_no_text(left_out[0])}')
    return files, left_out


def why_no_text(path):
    """Why a file cannot be read as text, as far as its name and its beginning tell; '' if it can."""
    _, suffix = format_of(path)
    if not path.stat().st_size:
        return 'the file is empty: leave it out or put text into it'
    if suffix in NOT_TEXT:
        return f'a {suffix} file is no text: convert it to .txt'
    if suffix in ROWS and text_key:
        return ''
    with opened(path) as file:
        if not strict:
            try:
                return ''.join('' for _ in running_text(path, file))
            except UserError as error:
                return str(error)
        place = file.read(8192).find(0)
    return '' if place < 0 else f'a NUL at byte {place}: it is not UTF-8 text: convert it'


# ----------------------------------------------------------------------------------------------------------------------
# formats

def json_rows(path, file):
    """Yields (where, row) of a file with an object on each line, or with a list of them."""
    empty = True
    for number, line in enumerate(lines_of(path, file), 1):
        listed = empty and line.lstrip().startswith('[')
        where = str(path) if listed else f'{path}, line {number}'
        try:
            rows = json.loads(line + file.read().decode() if listed else line) if line.strip() else []
        except (ValueError, RecursionError) as e:
            error = UserError(f'{where}: not JSON ({e}): mend it, or give --text_key= to read it as running text')
            if listed:
                raise error from e
            rows = error
        if listed:
            yield from ((f'{path}, row {i}', row) for i, row in enumerate(rows, 1))
        elif line.strip():
            yield where, rows
        empty = empty and not line.strip()


ROWS = {'.jsonl': json_rows, '.ndjson': json_rows, '.json': json_rows, '.csv': csv_rows, '.tsv': csv_rows,
        '.parquet': lambda path, file: parquet_rows(path, file, text_key)}


def text_of(where, row):
    """The text of a row, or of what is wrong with it; UserError if there is none."""
    if isinstance(row, UserError):
        raise row
    if not isinstance(row, dict):
        raise UserError(f'{where}: not an object with a {text_key!r} but {row!r:.40}')
    if text_key not in row:
        raise UserError(f'{where}: no {text_key!r}; its keys are {", ".join(row):.200}: give --text_key=KEY, or '
                        '--text_key= to read the file as running text')
    try:
        row[text_key].encode()
    except (AttributeError, UnicodeEncodeError) as e:
        raise UserError(f'{where}: {text_key!r} must be a text in UTF-8, not {row[text_key]!r:.40}') from e
    return row[text_key].replace('\r\n', '\n').replace('\r', '\n').replace('\ufeff', '')


def running_text(path, file):
    """Yields the text of a file as it is read."""
    utf8, newlines = codecs.getincrementaldecoder('utf-8')(), io.IncrementalNewlineDecoder(None, translate=True)
    place, data = 0, b' '
    while data:
        data = file.read(PIECE)
        if b'\0' in data:
            raise UserError(f'{path}: a NUL at byte {place + data.index(0)}: it is not UTF-8 text: convert it')
        begin = place - len(utf8.getstate()[0])  # of a character that the last read has cut
        try:
            text = utf8.decode(data, not data)
        except UnicodeDecodeError as e:
            raise UserError(f'{path}: byte {begin + e.start} is not UTF-8: convert the file, or, of a folder, leave it '
                            'out with --strict=False') from None
        yield newlines.decode(text, not data).replace('\ufeff', '')
        place += len(data)


def texts_of(path, file, skipped):
    """Yields the texts of a file, the only one or those of its rows; each is an iterable of str, read in its turn. Why
    rows were left out, which strict does not, is added to skipped."""
    _, suffix = format_of(path)
    if suffix not in ROWS or not text_key:
        yield running_text(path, file)
        return
    for where, row in ROWS[suffix](path, file):
        try:
            text = io.StringIO(text_of(where, row), newline='')
        except UserError as error:
            if strict:
                raise UserError(f'{error}; or leave such rows out with --strict=False') from None
            skipped.append(str(error))
            continue
        yield iter(lambda text=text: text.read(PIECE), '')


# ----------------------------------------------------------------------------------------------------------------------
# documents

def parts_of(chunks, found):
    """Yields (whether a document begins with it, piece) of a text, cut at separators and, where it does not matter to
    a tokenizer, about every PIECE characters. found['separators'] counts."""
    rest, parted, inside = '', False, False  # parted: there was a separator; inside: a document has begun

    def trimmed(piece, ends):
        piece = piece.rstrip(BLANK) if ends else piece
        return piece.lstrip(BLANK) if parted and not inside else piece

    for chunk in chunks:
        *ended, rest = (rest + chunk).split(separator) if separator else [rest + chunk]
        for piece in ended:
            if piece := trimmed(piece, ends=True):
                yield not inside, piece
            parted, inside = True, False
            found['separators'] += 1
        while len(rest) > PIECE:
            cut = find_cut(rest)
            if piece := trimmed(rest[:cut], ends=False):
                yield not inside, piece
                inside = True
            rest = rest[cut:]
    if rest := trimmed(rest, ends=parted):
        yield not inside, rest


def find_cut(text):
    """Where to cut a text: near its end, after a line, else after a word, else there; neither inside a separator whose
    end is still to come nor between it and its blanks."""
    begin, end = len(text) * 7 // 8, len(text) - max(1, len(separator))
    match = LINE_END.search(text, begin, end) or WORD_END.search(text, begin, end)
    return match.end() if match else len(text[:end].rstrip(BLANK)) or end


def numbered(files, found):
    """Yields (number of the document, piece) of all files, in order. found['separators'] counts; found['skipped']: why
    rows were left out."""
    number = -1
    for path in files:
        with opened(path) as file:  # whose errors come out where it is read: in here
            for text in texts_of(path, file, found['skipped']):
                for begins, piece in parts_of(text, found):
                    number += begins
                    yield number, piece


def pieces_of(files, split, by_document, boundary):
    """Yields (number of the document, piece) of a split.

    by_document: the val_fraction of the documents, evenly spaced, is for validation; else what lies beyond boundary, a
    number of characters of all documents one after another.
    """
    last = 0
    for number, piece in numbered(files, {'separators': 0, 'skipped': []}):
        if by_document:
            is_val = int((number + 1) * val_fraction) > int(number * val_fraction)
            cut = 0 if is_val else len(piece)
        else:
            cut = find_boundary(piece, boundary, number > last)
            boundary, last = boundary - len(piece), number
        if part := piece[cut:] if split == 'val' else piece[:cut]:
            yield number, part


def find_boundary(piece, place, begins):
    """Where to cut a piece: the first end of a line from a place in it on, else before the piece if a document begins
    with it, else after a word, else there."""
    if not 0 < place < len(piece):
        return len(piece) if place > 0 else 0
    match = re.compile(r'\n(?=[^\n])').search(piece, place) or not begins and WORD_END.search(piece, place)
    return match.end() if match else 0 if begins else place


# ----------------------------------------------------------------------------------------------------------------------

def check_knobs(folder):
    if not input:
        raise UserError('input: nothing to read: give --input=FILE.txt, --input=FOLDER or --input=ROWS.jsonl')
    if not re.fullmatch(r'\w[\w.-]*', name):
        raise UserError(f'name={name!r}: give --name=NAME, the plain name of a folder to be written in data/')
    if (folder / 'prepare.py').exists():
        raise UserError(f'name={name}: data/{name}/ belongs to its own prepare.py: choose another name')
    if not 0 < val_fraction < 1:
        raise UserError(f'val_fraction={val_fraction}: give a share between 0 and 1')
    if len(separator) > 1000:
        raise UserError(f'separator={separator!r:.40}…: give one of at most 1,000 characters')


def main():
    runtime.configure(globals())
    folder = Path(__file__).resolve().parents[1] / name
    check_knobs(folder)
    files, left_out = find_files(input)
    if left_out:
        names = ', '.join(map(str, left_out[:10])) + ', …' * (len(left_out) > 10)
        print(f'left out {len(left_out):,} files that are no text: {names}')
    found, count, total = {'separators': 0, 'skipped': []}, 0, 0
    for number, piece in numbered(files, found):
        count, total = number + 1, total + len(piece)
    print(f'{count:,} document{"s" * (count != 1)} in {len(files):,} file{"s" * (len(files) != 1)}'
          + f'; {separator!r} found {found["separators"]:,} times' * bool(separator))
    if found['skipped']:
        print(f'left out {len(found["skipped"]):,} rows; the first: {" / ".join(found["skipped"][:3])}')

    def pieces(split):
        return pieces_of(files, split, int(count * val_fraction) > 0, int(total * (1 - val_fraction)))

    def documents(split):
        for _, parts in groupby(pieces(split), itemgetter(0)):
            yield map(counted, map(itemgetter(1), parts))

    def counted(piece):
        letters.update(specials.findall(piece))
        return piece

    encoder = get_tokenizer(tokenizer, map(itemgetter(1), pieces('train')), vocab_size)
    if tokenizer == 'bpe' and encoder.n_vocab < vocab_size:
        print(f'{encoder.n_vocab:,} tokens, not vocab_size={vocab_size:,}: no pair stands twice in so little text')
    letters, specials = Counter(), re.compile('|'.join(map(re.escape, sorted(encoder.special, key=len, reverse=True))))
    write_dataset(folder, encoder, {split: documents(split) for split in ('train', 'val')},
                  f'{", ".join(input)}, val_fraction={val_fraction}, separator={separator!r}')
    if letters:
        print('these special tokens of the tokenizer stand in the text and stay letters: '
              + ', '.join(f'{token} ({n:,} times)' for token, n in letters.most_common(10)))


if __name__ == '__main__':
    runtime.cli(main)
