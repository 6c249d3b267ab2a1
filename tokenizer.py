"""Text <-> token ids: bytes, characters, a BPE trained here, or any tiktoken encoding, all behind one `Tokenizer`.

    tokenizer = get_tokenizer('bpe', texts, vocab_size=4096)
    ids = tokenizer.encode('To be, or not to be')
    tokenizer.decode(ids)

BPE (arXiv:1508.07909) on bytes as in GPT-2: `train_bpe` learns the merges here; encoding with them is tiktoken's work.
"""

import codecs
import difflib
import gc
import hashlib
import heapq
import json
import os
import re
from collections import Counter, defaultdict

import numpy as np
import regex
import tiktoken


class UserError(ValueError):
    """A mistake that the person at the keyboard can mend: one line that names what is wrong and the remedy."""


SPECIALS = ('<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|pad|>')
UNK = '<unk>'  # what `chars` makes of a character that its text did not have
KINDS = ('bytes', 'chars', 'bpe', 'tiktoken')

# How GPT-4 (cl100k_base) cuts text into words; BPE never merges across a cut.
GPT4_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r'|\s*[\r\n]+|\s+(?!\S)|\s+'
)
# The same cuts in pure ASCII text, for the standard library's engine: twice as fast. The commonest case comes first.
ASCII_PATTERN = (
    r" ?[A-Za-z]+|'(?:[sdmtSDMT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\nA-Za-z0-9][A-Za-z]+|[0-9]{1,3}"
    r'| ?[^\sA-Za-z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
# GPT-2's printable spelling of a byte: itself where Latin-1 can show it, else the next letter from U+0100 on ('Ġ' is a
# space). The base tokens have this order too, so that ties between equally frequent pairs fall as in GPT-2's own files.
PRINTABLE = [b for b in range(256) if chr(b).isprintable() and chr(b) != ' ']
BYTE_ORDER = PRINTABLE + sorted(set(range(256)) - set(PRINTABLE))
SPELLING = {b: chr(b if b in PRINTABLE else 256 + rank - len(PRINTABLE)) for rank, b in enumerate(BYTE_ORDER)}
UNSPELL = {char: b for b, char in SPELLING.items()}

# tiktoken dies of a million blanks in a row and knows valid UTF-8 only: such places are cut out before it sees text.
BLANKS = 500_000
AWKWARD = re.compile(rf'(\s{{{BLANKS}}}|[\udc80-\udcff]+)')


def _utf8(text):
    """Text -> bytes. Half a surrogate pair, which has no UTF-8, becomes U+FFFD as in tiktoken."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace').encode()


def _is_char(text):
    return len(text) == 1 and not '\ud800' <= text <= '\udfff'


class Tokenizer:
    """Ids 0 … n_vocab-1 <-> text. Made by `get_tokenizer` and its like or `load`, not by hand.

    tokens: the bytes of every id in order, b'' where the id is a special token (or not in use); special: name -> id.
    """

    def __init__(self, kind, name, tokens, special, pattern=None):
        self.kind, self.name, self.tokens, self.special, self.pattern = kind, name, tokens, special, pattern
        self.n_vocab = len(tokens)
        self.eot = special['<|endoftext|>']
        self.bytes_of = dict(enumerate(tokens)) | {i: _utf8(s) for s, i in special.items()}
        self.special_regex = re.compile('(' + '|'.join(map(re.escape, sorted(special, key=len, reverse=True))) + ')')
        if kind == 'chars':
            self.id_of = {token.decode(): i for i, token in enumerate(tokens) if token}
        elif kind != 'bytes':
            self.id_of = {token: i for i, token in enumerate(tokens) if token}
            try:
                self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=self.id_of, special_tokens={})
                empty = regex.match(pattern, '')  # of which tiktoken would die
            except (ValueError, regex.error) as error:
                raise UserError(f"'pattern' is no regular expression: {' '.join(str(error).split())}") from None
            if empty:
                raise UserError("'pattern' must not match an empty text")

    def encode(self, text, allow_special=False):
        """Text (str or any bytes) -> list of ids. '<|endoftext|>' and so on are plain text unless `allow_special`."""
        data = text if isinstance(text, bytes) else _utf8(text)
        text = data.decode('utf-8', 'surrogateescape')  # a byte that is no UTF-8 travels as U+DC80 … U+DCFF
        if not allow_special:
            return self._encode_ordinary(text)
        ids = []
        for i, part in enumerate(self.special_regex.split(text)):
            ids += [self.special[part]] if i % 2 else self._encode_ordinary(part)
        return ids

    def _encode_ordinary(self, text):
        if self.kind == 'bytes':
            return list(text.encode('utf-8', 'surrogateescape'))
        if self.kind == 'chars':
            return [self.id_of.get(char, self.special[UNK]) for char in text]
        if text.isascii() and len(text) < BLANKS:
            return self.encoding.encode_ordinary(text)
        ids = []
        for part in AWKWARD.split(text):
            if part and '\udc80' <= part[0] <= '\udcff':
                ids += [self.id_of[bytes([b])] for b in part.encode('utf-8', 'surrogateescape')]
            else:
                ids += self.encoding.encode_ordinary(part)
        return ids

    def encode_batch(self, texts):
        """An iterable of ordinary texts -> a list of their ids; tiktoken's threads where no text needs special care."""
        texts = list(texts)
        if self.kind in ('bpe', 'tiktoken') and all(isinstance(t, str) and len(t) < BLANKS for t in texts):
            return self.encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count())
        return [self.encode(t) for t in texts]

    def decode_bytes(self, ids):
        """Ids -> bytes; special tokens come out by their names."""
        try:
            return b''.join([self.bytes_of[i] for i in ids])
        except KeyError as error:
            raise UserError(f'token id {error} is outside the {self.n_vocab} ids of tokenizer {self.name}') from None

    def decode(self, ids):
        """Ids -> str; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode('utf-8', 'replace')

    def stream(self):
        """A decoder for ids that come one by one: its texts, flush() last, add up to decode() of all the ids."""
        return Stream(self)

    def token_bytes(self):
        """Bytes of text that each id stands for, int32 (n_vocab,), 0 for specials: what bits per byte divide by."""
        return np.array([len(token) for token in self.tokens], dtype=np.int32)

    def to_dict(self):
        """Everything, in plain JSON types; bytes are spelled as in GPT-2's files ('Ġ' is a space)."""
        spell = bytes.decode if self.kind == 'chars' else lambda token: ''.join([SPELLING[b] for b in token])
        return {'kind': self.kind, 'name': self.name, 'special': dict(self.special), 'pattern': self.pattern or '',
                'tokens': [spell(token) for token in self.tokens]}

    @staticmethod
    def from_dict(d):
        """The inverse of `to_dict`; UserError says what is wrong with a dict that is no tokenizer."""
        def need(condition, what):
            if not condition:
                raise UserError(f'not a tokenizer: {what}')

        need(isinstance(d, dict) and d.get('kind') in KINDS, f"'kind' must be one of {', '.join(KINDS)}")
        kind, name, special, spelled, pattern = (d.get(k) for k in ('kind', 'name', 'special', 'tokens', 'pattern'))
        need(isinstance(name, str), "'name' must be a string")
        need(isinstance(spelled, list) and all(isinstance(t, str) for t in spelled), "'tokens' must be a list of str")
        need(isinstance(special, dict), "'special' must map names to ids")
        missing = [s for s in SPECIALS + (UNK,) * (kind == 'chars') if s not in special]
        need(not missing, f"'special' lacks {', '.join(missing)}")
        for s, i in special.items():
            need(s and isinstance(s, str) and type(i) is int and 0 <= i < len(spelled) and not spelled[i],
                 f"the id of special token '{s}' must be a line of 'tokens' that is empty")
        need(len(set(special.values())) == len(special), 'two special tokens share an id')
        first = {}
        for i, token in enumerate(spelled):
            need(not token or first.setdefault(token, i) == i, f'token {i} is the same as token {first.get(token)}')
            good = _is_char(token) or not token if kind == 'chars' else all(c in UNSPELL for c in token)
            need(good, f'token {i} is misspelled: {token!r}')
        if kind == 'chars':
            return Tokenizer(kind, name, [t.encode() for t in spelled], special)
        tokens = [bytes([UNSPELL[c] for c in t]) for t in spelled]
        if kind == 'bytes':
            need(tokens[:256] == [bytes([b]) for b in range(256)] and not any(tokens[256:]),
                 "'tokens' must be the 256 bytes in order")
            return Tokenizer(kind, name, tokens, special)
        need(len({t for t in tokens if len(t) == 1}) == 256, "'tokens' must hold each of the 256 single bytes")
        need(isinstance(pattern, str), "'pattern' must be a string")
        return Tokenizer(kind, name, tokens, special, pattern)

    def save(self, path):
        """Write one JSON file with a token a line; at every instant `path` is the old file or the whole new one."""
        try:
            with open(f'{path}.tmp', 'w', encoding='utf-8') as f:
                json.dump(self.to_dict(), f, ensure_ascii=False, indent=0)
                f.flush()
                os.fsync(f.fileno())
            os.replace(f'{path}.tmp', path)
        except OSError as error:
            raise UserError(f'cannot write {path}: {error.strerror}') from None

    @staticmethod
    def load(path):
        """Read what `save` wrote."""
        try:
            with open(path, encoding='utf-8') as f:
                d = json.load(f)
            return Tokenizer.from_dict(d)
        except OSError as error:
            raise UserError(f'cannot read {path}: {error.strerror}') from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: {error if isinstance(error, UserError) else f'not JSON: {error}'}") from None


class Stream:
    """push(id) -> the text that is complete by now, flush() -> what is left; never half a UTF-8 character."""

    def __init__(self, tokenizer):
        self.tokenizer, self.decoder = tokenizer, codecs.getincrementaldecoder('utf-8')('replace')

    def push(self, token):
        return self.decoder.decode(self.tokenizer.decode_bytes([token]))

    def flush(self):
        return self.decoder.decode(b'', final=True)


def _with_specials(kind, name, tokens, special, pattern=None):
    """Give the SPECIALS that are missing the ids after the last one."""
    special = dict(special)
    for s in (UNK, *SPECIALS) if kind == 'chars' else SPECIALS:
        if s not in special:
            special[s] = len(tokens)
            tokens = tokens + [b'']
    return Tokenizer(kind, name, tokens, special, pattern)


def bytes_tokenizer():
    """Ids 0 … 255 are the bytes of UTF-8, the specials follow: 260 ids, no training, no surprise."""
    return _with_specials('bytes', 'bytes', [bytes([b]) for b in range(256)], {})


def chars_tokenizer(texts):
    """An id per character that `texts` (an iterable of str) has, sorted as in nanoGPT; then <unk> and the specials."""
    chars = set()
    for text in [texts] if isinstance(texts, str) else texts:
        chars.update(text)
    chars = sorted(filter(_is_char, chars))
    if not chars:
        raise UserError('there is no text to take the characters from')
    return _with_specials('chars', 'chars', [c.encode() for c in chars], {})


def train_bpe(texts, vocab_size, pattern=GPT4_PATTERN):
    """Learn a byte-level BPE of `vocab_size` ids: the specials, the 256 bytes, and the rest merges.

    texts: an iterable of str, read once; a text's end is a word's end. Only the distinct words are kept in memory.
    When no pair is left to merge the vocabulary stays smaller: see `n_vocab`. What `pattern` does not match, encoding
    drops. The merges are those of Hugging Face `tokenizers` for the same words.
    """
    smallest = 256 + len(SPECIALS)
    if vocab_size < smallest:
        raise UserError(f'vocab_size={vocab_size} is too small for bpe: 256 bytes and {len(SPECIALS)} special tokens '
                        f'need at least {smallest}')
    words = _count_words([texts] if isinstance(texts, str) else texts, pattern)
    if not words:
        raise UserError('there is no text to train a bpe tokenizer on')
    collecting = gc.isenabled()
    gc.disable()  # there is no garbage below, and looking for it again and again takes a third of the time
    try:
        tokens, _ = learn_merges(words, vocab_size - len(SPECIALS))
    finally:
        if collecting:
            gc.enable()
    return _with_specials('bpe', f'bpe-{len(tokens) + len(SPECIALS)}', tokens, {}, pattern)


def _count_words(texts, pattern):
    """Counter of the words that `pattern` cuts the texts into."""
    words = Counter()
    split, split_ascii = regex.compile(pattern).findall, None
    if pattern == GPT4_PATTERN:
        split_ascii = re.compile(ASCII_PATTERN, re.ASCII).findall
    # GPT-4's words always end at a newline that no blank follows: there a long text is cut, to stay small in memory.
    next_cut = re.compile(r'\n(?=\S)').search
    for text in texts:
        start = 0
        while start < len(text):
            cut = next_cut(text, start + 2**16) if split_ascii else None
            end = cut.end() if cut else len(text)
            chunk = text[start:end]
            words.update(split_ascii(chunk) if split_ascii and chunk.isascii() else split(chunk))
            start = end
    return words


def learn_merges(words, n_tokens):
    """BPE merges: Counter of words -> (tokens, merges), the bytes of each id and the pairs of ids in order of merging.

    Again and again the most frequent pair of neighbours becomes one token; of equally frequent pairs, the one with the
    smallest ids. Ends with n_tokens tokens or when no pair is left. No two pairs can spell the same token: wherever its
    bytes stand between two boundaries that no merge has crossed, the same merges have cut them in the same way.
    """
    to_id = bytes(BYTE_ORDER.index(b) for b in range(256))
    # All distinct words in one row of ids with -1 between them; a word's weight is how often it occurs. A merge puts
    # the new id in the pair's first place and -2 in its second; left and right skip what is gone.
    row, weight = [-1], [0]
    for word, n in words.items():
        ids = _utf8(word).translate(to_id)
        row += ids
        row.append(-1)
        weight += [n] * (len(ids) + 1)
    places = list(range(len(row)))
    left, right = [0] + places[:-1], places[1:] + [0]
    where, count = defaultdict(list), {}  # of each pair: its places from left to right (some may be gone), exact count
    for i, pair in zip(places, zip(row, row[1:], strict=False), strict=False):
        where[pair].append(i)
    for pair in [pair for pair in where if min(pair) < 0]:
        del where[pair]
    for pair, at in where.items():
        count[pair] = sum([weight[i] for i in at])
    heap = [(-n, pair) for pair, n in count.items()]
    heapq.heapify(heap)

    tokens, merges = [bytes([b]) for b in BYTE_ORDER], []
    while len(tokens) < n_tokens and heap:
        n, pair = heapq.heappop(heap)
        if count[pair] != -n:  # other merges ate into this pair since it was pushed: back in line with what is left
            if count[pair]:
                heapq.heappush(heap, (-count[pair], pair))
            continue
        a, b = pair
        new = len(tokens)
        tokens.append(tokens[a] + tokens[b])
        merges.append(pair)
        before, after = defaultdict(list), defaultdict(list)  # neighbour -> places of its new pair with `new`
        for i in where.pop(pair):
            j = right[i]
            if row[i] == a and row[j] == b:  # else another merge took it, or in a run like 'aaa' this one
                h, k = left[i], right[j]
                before[row[h]].append(h)
                after[row[k]].append(i)
                row[i], row[j] = new, -2
                right[i], left[k] = k, i
        changes = [((b, c), (new, c), at) for c, at in after.items() if c >= 0]
        changes += [((c, a), (c, new), at) for c, at in before.items() if c >= 0]
        for old, fresh, at in changes:
            count[fresh] = sum([weight[i] for i in at])
            count[old] -= count[fresh]
            where[fresh] = at
        for _, fresh, _ in changes:
            if count[fresh]:
                heapq.heappush(heap, (-count[fresh], fresh))
    return tokens, merges


def get_tokenizer(name, texts=None, vocab_size=None):
    """'bytes', 'chars', 'bpe' (these two learn from `texts`, an iterable of str) or the name of a tiktoken encoding.

    A tiktoken encoding keeps its own special tokens; those of SPECIALS that it lacks come after its vocabulary.
    """
    if name == 'bytes':
        return bytes_tokenizer()
    if name in ('chars', 'bpe') and texts is None:
        raise UserError(f"tokenizer '{name}' learns from text and was given none")
    if name == 'chars':
        return chars_tokenizer(texts)
    if name == 'bpe':
        if vocab_size is None:
            raise UserError("tokenizer 'bpe' needs a vocab_size, for example 4096")
        return train_bpe(texts, vocab_size)
    names = ['bytes', 'chars', 'bpe', *tiktoken.list_encoding_names()]
    if name not in names:
        nearest = difflib.get_close_matches(name, names, 1, 0)[0]
        raise UserError(f"unknown tokenizer '{name}': did you mean '{nearest}'?")
    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        url = getattr(getattr(error, 'request', None), 'url', None)
        if url is None:
            raise UserError(f"cannot read tiktoken's encoding '{name}': {error}") from None
        raise UserError(f"no network for tiktoken's encoding '{name}': download {url}, call the file "
                        f'{hashlib.sha1(url.encode()).hexdigest()} and set TIKTOKEN_CACHE_DIR to its folder') from None
    special, ranks = encoding._special_tokens, encoding._mergeable_ranks  # as tiktoken's README extends an encoding
    tokens = [b''] * encoding.n_vocab
    for token, rank in ranks.items():
        tokens[rank] = token
    return _with_specials('tiktoken', name, tokens, special, encoding._pat_str)
