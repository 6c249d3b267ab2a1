"""
tinyshakespeare, the 1.1 MB of char-rnn and nanoGPT -> train.bin and val.bin here, or in ../NAME.

As in nanoGPT: the first 90% of the characters are for training, the rest for validation, the vocabulary is the
characters of the whole text, and there is no end-of-text token, so that losses compare with published ones.

    python data/tinyshakespeare/prepare.py
    python data/tinyshakespeare/prepare.py --input=input.txt --tokenizer=bpe --name=tinyshakespeare_bpe
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import runtime

from preparation import check_sha256, fetch_url, folder_for, write_dataset
from tokenizer import UserError, get_tokenizer

input = ''  # the text file; empty: fetch it to input.txt here
name = ''  # the dataset is written to data/NAME/ instead
tokenizer = 'chars'  # bytes, chars, bpe (trained on the training part), a tiktoken encoding, or a model's folder
vocab_size = 1024  # of bpe, special tokens included

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


def main():
    runtime.configure(globals())
    folder = folder_for(__file__, name)
    path = Path(input) if input else Path(__file__).parent / 'input.txt'
    if not input and not path.exists():
        fetch_url(URL, path, sha256=SHA256)
    if not path.is_file():
        raise UserError(f'{path}: no such file: give the text of {URL} or no --input')
    check_sha256(path, SHA256)
    text = path.read_text(encoding='utf-8')
    cut = int(len(text) * 0.9)
    encoder = get_tokenizer(tokenizer, [text if tokenizer == 'chars' else text[:cut]], vocab_size)
    write_dataset(folder, encoder, {'train': [text[:cut]], 'val': [text[cut:]]}, f'{URL} (sha256 {SHA256})', eot=False)


if __name__ == '__main__':
    runtime.cli(main)
