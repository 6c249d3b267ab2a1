"""
FineWeb, a sample of 10 billion GPT-2 tokens of web pages, in llm.c shards of 100 million (200 MB) -> this folder.

The shards are those of kjj0/fineweb10B-gpt2 on the Hugging Face Hub: one for validation, 103 for training. They are
used as they are; a download that was cut goes on where it stopped.

    python data/fineweb/prepare.py --num_shards=8
    python data/fineweb/prepare.py --input=FOLDER_WITH_SHARDS
"""
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import runtime

from dataset import find_shards, llmc_shard
from preparation import fetch_url
from tokenizer import UserError

input = ''  # a folder with fineweb_val_*.bin and fineweb_train_*.bin, linked (or copied) here; empty: fetch them
num_shards = 1  # training shards to fetch, 1 to 103
url = 'https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main'  # where they are fetched from


def main():
    runtime.configure(globals())
    if not 1 <= num_shards <= 103:
        raise UserError(f'num_shards={num_shards}: give 1 to 103')
    folder = Path(__file__).parent
    if input:
        found = [find_shards(input, split) for split in ('val', 'train')]
        if not all(found):
            raise UserError(f'{input}: no fineweb_val_*.bin and fineweb_train_*.bin there: fetch them from {url}')
        for shard in sum(found, []):
            llmc_shard(shard)
        for shard in sum(found, []):
            bring(shard, folder / shard.name)
    else:
        for name in ['fineweb_val_000000.bin', *(f'fineweb_train_{i + 1:06}.bin' for i in range(num_shards))]:
            if not (folder / name).exists():
                fetch_url(f'{url}/{name}', folder / f'{name}.new')
                llmc_shard(folder / f'{name}.new')
                (folder / f'{name}.new').replace(folder / name)
    for split in ('train', 'val'):
        shards = find_shards(folder, split)
        print(f'{folder}: {len(shards)} {split} shards, {sum(len(llmc_shard(s)) for s in shards):,} tokens')


def bring(source, target):
    """Links source to target, or copies it where that cannot be."""
    if target.exists() and target.samefile(source):
        return
    part = target.with_name(target.name + '.part')
    part.unlink(missing_ok=True)
    try:
        os.link(source, part)
    except OSError:
        shutil.copyfile(source, part)
    part.replace(target)


if __name__ == '__main__':
    runtime.cli(main)
