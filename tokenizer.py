"""Text <-> token ids: bytes, characters, a BPE trained here, tiktoken's encodings, Hugging Face's BPE tokenizers.

    tokenizer = get_tokenizer('bpe', texts, vocab_size=4096)
    ids = tokenizer.encode('To be, or not to be')
    tokenizer.decode(ids)
    tokenizer = hf_tokenizer('SmolLM2-135M-Instruct')  # the folder that has the tokenizer.json
    ids, mask = tokenizer.chat_ids([{'role': 'user', 'content': 'Hi'}], generate=True)

BPE (arXiv:1508.07909) on bytes as in GPT-2: `train_bpe` learns the merges here; encoding with them is tiktoken's work.
Tokenizers of other people's models are run by the `tokenizers` library, which made them: see `HFTokenizer`.
The calculator that an assistant may call in its answers is here, too: chats are tokenised around its results.
"""

import codecs
import datetime
import difflib
import functools
import gc
import hashlib
import heapq
import itertools
import json
import os
import re
from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np

from chat import GUARD, ROLES, TEMPLATES, ChatTemplate, any_of, chatml, markers_in
from errors import UserError, one_line
from progress import Progress, counted

SPECIALS = ('<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|pad|>')
UNK = '<unk>'  # what `chars` makes of a character that its text did not have
KINDS = ('bytes', 'chars', 'bpe', 'tiktoken', 'hf')

# How GPT-4 (cl100k_base) and Llama 3 cut text into words; BPE never merges across a cut.
GPT4_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r'|\s*[\r\n]+|\s+(?!\S)|\s+'
)
# The same cuts in pure ASCII text, for the standard library's engine: twice as fast. The commonest case comes first.
ASCII_PATTERN = (
    r" ?[A-Za-z]+|'(?:[sdmtSDMT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\nA-Za-z0-9][A-Za-z]+|[0-9]{1,3}"
    r'| ?[^\sA-Za-z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM2 first makes each digit a word, then cuts what is between as GPT-2: blanks before a digit are at a text's end.
SMOLLM_PATTERN = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
QWEN2_PATTERN = GPT4_PATTERN.replace(r'\p{N}{1,3}', r'\p{N}')
# What a GGUF file calls them: the pattern, whether text becomes NFC first, whether whole words are looked up unmerged.
GGUF_PRE = {'gpt-2': (GPT2_PATTERN, False, False), 'smollm': (SMOLLM_PATTERN, False, False),
            'qwen2': (QWEN2_PATTERN, True, False), 'llama-bpe': (GPT4_PATTERN, False, True),
            'dbrx': (GPT4_PATTERN, False, False)}
# GPT-2's printable spelling of a byte: itself where Latin-1 can show it, else the next letter from U+0100 on ('Ġ' is a
# space). The base tokens have this order too, so that ties between equally frequent pairs fall as in GPT-2's own files.
PRINTABLE = [b for b in range(256) if chr(b).isprintable() and chr(b) != ' ']
BYTE_ORDER = PRINTABLE + sorted(set(range(256)) - set(PRINTABLE))
SPELLING = {b: chr(b if b in PRINTABLE else 256 + rank - len(PRINTABLE)) for rank, b in enumerate(BYTE_ORDER)}
UNSPELL = {char: b for b, char in SPELLING.items()}

# Of the tokenizers library: how bytes are spelled; the decoders whose text is that of the tokens, one after the other;
# what is kept of tokenizer_config.json, and of generation_config.json with its names in GGUF; what an id must not
# exceed; a text to compare tokenizers by.
BYTE_LEVEL = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
DECODERS = [BYTE_LEVEL, {'type': 'Replace', 'pattern': {'String': '▁'}, 'content': ' '}, {'type': 'ByteFallback'},
            {'type': 'Fuse'}, {'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0},
            *({'type': 'Metaspace', 'replacement': '▁', 'prepend_scheme': how, 'split': split}
              for how in ('always', 'first', 'never') for split in (True, False))]
CHAT_TOKENS = (('<|im_start|>', '<|im_end|>', 'chatml'), ('<start_of_turn>', '<end_of_turn>', 'gemma'))  # and template
KEPT = ('bos_token', 'eos_token', 'unk_token', 'pad_token', 'add_bos_token', 'chat_template')
SAMPLING = {'temperature': 'temp', 'top_k': 'top_k', 'top_p': 'top_p', 'min_p': 'min_p',
            'repetition_penalty': 'penalty_repeat'}
MAX_VOCAB = 10**7
PROBE = "It's 12345 days; naïve CAFÉ's\n\n  東京の e\u0301 \t x = f(a_b)[3];\r\n\t🙂 <b>&amp;</b>  end "

# tiktoken dies of a million blanks in a row and knows valid UTF-8 only: such places are cut out before it sees text.
BLANKS = 500_000
AWKWARD = re.compile(rf'(\s{{{BLANKS}}}|[\udc80-\udcff]+)')

CALC_TOKEN = re.compile(r'(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+|[-+*/()]')
CALC_LENGTH, CALC_DEPTH, CALC_LIMIT, CALC_DECIMALS = 200, 20, 10**15, 6


# ----------------------------------------------------------------------------------------------------------------------
# the calculator

def calculate(expr):
    """The value of an arithmetic expression as a short text: '7', '-2.5', '0.333333', or 'error'.

        sum     = product {('+' | '-') product}
        product = factor {('*' | '/') factor}
        factor  = '-' factor | '(' sum ')' | number
        number  = digits, which may have commas between thousands, and may go on with '.' and digits; or '.' and digits

    Spaces may stand between these. It is exact, in fractions; only the result is rounded, to CALC_DECIMALS decimals.
    'error' is what is not of this grammar, is longer than CALC_LENGTH characters, nests parentheses and signs deeper
    than CALC_DEPTH, divides by zero, or has a number, given or on the way, that is not below CALC_LIMIT.
    """
    if len(expr) > CALC_LENGTH or CALC_TOKEN.sub('', expr).strip(' '):
        return 'error'
    tokens = CALC_TOKEN.findall(expr)[::-1]
    try:
        value = _sum(tokens, 0)
    except (ValueError, ZeroDivisionError):
        return 'error'
    if tokens:
        return 'error'
    scaled = round(value * 10**CALC_DECIMALS)
    digits = f'{abs(scaled):0{CALC_DECIMALS + 1}}'
    return '-' * (scaled < 0) + f'{digits[:-CALC_DECIMALS]}.{digits[-CALC_DECIMALS:]}'.rstrip('0').rstrip('.')


def _bounded(value):
    if abs(value) >= CALC_LIMIT:
        raise ValueError
    return value


def _sum(tokens, depth):
    """Takes a sum from the end of reversed tokens -> its value, a Fraction; ValueError where there is none."""
    value = _product(tokens, depth)
    while tokens and tokens[-1] in '+-':
        value = _bounded(value + _product(tokens, depth) if tokens.pop() == '+' else value - _product(tokens, depth))
    return value


def _product(tokens, depth):
    value = _factor(tokens, depth)
    while tokens and tokens[-1] in '*/':
        value = _bounded(value * _factor(tokens, depth) if tokens.pop() == '*' else value / _factor(tokens, depth))
    return value


def _factor(tokens, depth):
    if depth > CALC_DEPTH or not tokens:
        raise ValueError
    token = tokens.pop()
    if token == '-':
        return -_factor(tokens, depth + 1)
    if token != '(':
        return _bounded(Fraction(token.replace(',', '')))  # of an operator: ValueError
    value = _sum(tokens, depth + 1)
    if not tokens or tokens.pop() != ')':
        raise ValueError
    return value


# ----------------------------------------------------------------------------------------------------------------------
# tokenizers

def _utf8(text):
    """Text -> bytes. Half a surrogate pair, which has no UTF-8, becomes U+FFFD as in tiktoken."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace').encode()


def _is_char(text):
    return len(text) == 1 and not '\ud800' <= text <= '\udfff'


def _valid(text, errors='surrogateescape'):
    """Text (str or any bytes) -> str in which a byte that is no UTF-8 travels as U+DC80 … U+DCFF."""
    if isinstance(text, str) and text.isascii():
        return text
    return (text if isinstance(text, bytes) else _utf8(text)).decode('utf-8', errors)


def _need(condition, what):
    if not condition:
        raise UserError(f'not a tokenizer: {what}')


class Tokenizer:
    """Ids 0 … n_vocab-1 <-> text. Made by `get_tokenizer` and its like or `load`, not by hand.

    tokens: the bytes of every id in order, b'' where the id is a special token (or not in use); special: name -> id.
    eot, stop_ids: the ids that end a text; bos: the id that starts one, or None; chat_template: how a chat becomes
    text, in Jinja (see chat.py), or None; sampling: how answers of a chat are drawn unless somebody says otherwise.
    """

    sampling = {'temperature': 0.2, 'top_p': 0.9}  # at 0.8, right for a text, small models of chats ramble
    # an HFTokenizer sets these: anew: text after a special token starts a text; strips: decoding drops its first space
    bos, anew, strips = None, True, False

    def __init__(self, kind, name, tokens, special, pattern=None, chat_template=None):
        self.kind, self.name, self.tokens, self.special, self.pattern = kind, name, tokens, special, pattern
        self.n_vocab = len(tokens)
        self.eot = special['<|endoftext|>']
        self.stop_ids, self.chat_template = [self.eot], chat_template or TEMPLATES['chatml']
        self.bytes_of = dict(enumerate(tokens)) | {i: _utf8(s) for s, i in special.items()}
        self.special_regex = any_of(special)
        if kind == 'chars':
            self.id_of = {token.decode(): i for i, token in enumerate(tokens) if token}
        elif kind != 'bytes':
            import regex
            import tiktoken  # here, for most commands do without
            self.id_of = {token: i for i, token in enumerate(tokens) if token}
            try:
                self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=self.id_of, special_tokens={})
                empty = regex.compile(pattern).match('')
            except (ValueError, regex.error) as error:
                raise UserError(f"'pattern' is no regular expression: {one_line(error)}") from None
            if empty:  # of which tiktoken would die
                raise UserError("'pattern' must not match an empty text")

    def encode(self, text, allow_special=False, start=True):
        """Text (str or any bytes) -> list of ids. '<|endoftext|>' and so on are plain text unless `allow_special`.

        start: whether a text starts here, or goes on: SentencePiece puts a blank before the first word of a text.
        """
        text = _valid(text)
        if not allow_special:
            return self._encode_ordinary(text, start)
        ids = []
        for i, part in enumerate(self.special_regex.split(text)):
            ids += [self.special[part]] if i % 2 else self._encode_ordinary(part, start)
        return ids

    def _encode_ordinary(self, text, start=True):
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

    def encode_batch(self, texts, starts=None):
        """An iterable of ordinary texts -> a list of their ids; in threads where no text needs special care.

        starts: of each text, as in `encode`; None where all start.
        """
        texts = list(texts)
        if self.kind in ('bpe', 'tiktoken') and all(isinstance(t, str) and len(t) < BLANKS for t in texts):
            return self.encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count())
        return [self.encode(t) for t in texts]

    @property
    def turn_ids(self):
        """The ids that end an assistant's turn: of a chat, or a text."""
        try:
            end = self.special.get(self.chat.end)
        except UserError:  # it has no chats
            end = None
        return [*self.stop_ids] if end in (None, *self.stop_ids) else [*self.stop_ids, end]

    @functools.cached_property
    def turn_header(self):
        """The ids that begin an assistant's turn, [] where there are none or it has no chats."""
        try:
            asked = [{'role': 'user', 'content': '?'}]
            before, ids = self.chat_ids(asked)[0], self.chat_ids(asked, generate=True)[0]
        except UserError:
            return []
        return ids[len(before):] if ids[:len(before)] == before else []

    @functools.cached_property
    def chat(self):
        """The ChatTemplate of this tokenizer; UserError where it has none."""
        if not self.chat_template:
            raise UserError(f'tokenizer {self.name} has no chat template: let sft.py give it one '
                            '(--chat_template=chatml), or take that of an instruct model')
        template = self._chat_template()
        if template.end is None:
            raise UserError(f'the chat template of tokenizer {self.name} ends turns with no token of its vocabulary: '
                            'give another (sft.py --chat_template=chatml)')
        return template

    def _chat_template(self):
        return ChatTemplate(self.chat_template, [*self.special], ['<|endoftext|>'], names=self.names())

    def chat_ids(self, messages, generate=False, calls=True):
        """A chat, a list of {'role': …, 'content': …} -> (ids, mask), as its chat template renders it.

        Content is ordinary text: no marker in it becomes a token, but for those that the assistant may write itself,
        such as <think>. mask is 1 on the tokens that the assistant has to produce, what it says and the end of its
        turn, and 0 elsewhere. generate: end where the assistant's next message begins, which may be the first; mask is
        0. calls: see `ChatTemplate.segments`. UserError for a chat that the template cannot have.
        """
        if not isinstance(messages, list) or not (messages or generate):
            raise UserError("a chat must be a list of at least one {'role': …, 'content': …}")
        for i, m in enumerate(messages):
            if not isinstance(m, dict) or m.get('role') not in ROLES or not (
                    isinstance(m.get('content'), str) or m.get('tool_calls') and m.get('content') is None):
                raise UserError(f"message {i} of the chat must have a 'role' ({', '.join(ROLES)}) and a 'content' that "
                                f'is a string')
        ids, mask, ends = [], [], {*self.special.values()}
        for text, learned in self.chat.segments(messages, generate, calls):
            ids += self._encode_rendered(text, not ids or self.anew and ids[-1] in ends)
            mask += [int(learned)] * (len(ids) - len(mask))
        return ids, mask

    def _encode_rendered(self, text, start):
        """A text with special tokens, of which those with GUARD in their names are no more than text."""
        if GUARD not in text:
            return self.encode(text, allow_special=True, start=start)
        ids = []
        for i, part in enumerate(self.special_regex.split(text)):
            ids += [self.special[part]] if i % 2 else self._encode_guarded(part, start if not ids else self.anew)
        return ids

    def _encode_guarded(self, text, start):
        return self._encode_ordinary(text.replace(GUARD, ''), start)

    def decode_bytes(self, ids):
        """Ids -> bytes; special tokens come out by their names."""
        try:
            return b''.join([self.bytes_of[i] for i in ids])
        except KeyError as error:
            raise UserError(f'token id {error} is outside the {self.n_vocab} ids of tokenizer {self.name}') from None

    def decode(self, ids, start=True):
        """Ids -> str; bytes that are not UTF-8 become U+FFFD. start: as in `encode`: the blank put there goes."""
        data = self.decode_bytes(ids)
        return (data.removeprefix(b' ') if start and self.strips else data).decode('utf-8', 'replace')

    def stream(self, start=True):
        """A decoder for ids that come one by one: its texts, flush() last, add up to decode() of all the ids."""
        return Stream(self, start)

    def token_bytes(self):
        """Bytes of text that each id stands for, int32 (n_vocab,), 0 for specials: what bits per byte divide by."""
        special = {*self.special.values()}
        return np.array([0 if i in special else len(self.bytes_of[i]) for i in range(self.n_vocab)], dtype=np.int32)

    def token_lines(self):
        """What each id does to lines, uint8 (n_vocab,): 1 if its text is not blank, and 2 more if it has a newline."""
        special = {*self.special.values()}
        texts = [b'' if i in special else self.bytes_of[i] for i in range(self.n_vocab)]
        return np.array([bool(text.strip()) + 2 * (b'\n' in text) for text in texts], dtype=np.uint8)

    def to_dict(self):
        """Everything, in plain JSON types; bytes are spelled as in GPT-2's files ('Ġ' is a space)."""
        spell = bytes.decode if self.kind == 'chars' else lambda token: ''.join([SPELLING[b] for b in token])
        return {'kind': self.kind, 'name': self.name, 'special': dict(self.special), 'pattern': self.pattern or '',
                'tokens': [spell(token) for token in self.tokens]} | (
                    {} if self.chat_template == TEMPLATES['chatml'] else {'chat_template': self.chat_template})

    def with_tokens(self, names):
        """`to_dict` of this tokenizer with more special tokens, their ids behind the others."""
        d = self.to_dict()
        more = {name: self.n_vocab + i for i, name in enumerate(names)}
        return d | {'special': d['special'] | more, 'tokens': d['tokens'] + [''] * len(more)}

    def same_as(self, other):
        """Whether another tokenizer, or its `to_dict`, makes the same of every text, whatever it makes of chats.

        Files of Hugging Face that differ are the same if each id means the same and a difficult text has the same ids.
        """
        other = Tokenizer.from_dict(other) if isinstance(other, dict) else other
        if 'hf' not in (self.kind, other.kind):
            same = {'name': '', 'chat_template': ''}
            return self.to_dict() | same == other.to_dict() | same
        if (self.n_vocab, self.special, self.encode(PROBE)) != (other.n_vocab, other.special, other.encode(PROBE)):
            return False
        return all(self.bytes_of[i] == other.bytes_of[i] for i in range(self.n_vocab))

    @staticmethod
    def from_dict(d):
        """The inverse of `to_dict`; UserError says what is wrong with a dict that is no tokenizer."""
        _need(isinstance(d, dict) and d.get('kind') in KINDS, f"'kind' must be one of {', '.join(KINDS)}")
        kind, name, special, spelled, pattern = (d.get(k) for k in ('kind', 'name', 'special', 'tokens', 'pattern'))
        _need(isinstance(name, str), "'name' must be a string")
        if kind == 'hf' and 'tokenizer_json' in d:
            text, config, ends = (d.get(k) for k in ('tokenizer_json', 'config', 'ends'))
            _need(isinstance(text, str), "'tokenizer_json' must be a string")
            _need(isinstance(config, dict), "'config' must be a dict")
            _need(isinstance(ends, list), "'ends' must be a list of ids")
            return HFTokenizer(name, text, config | {k: d[k] for k in ('chat_template',) if k in d}, ends)
        _need(isinstance(spelled, list) and all(isinstance(t, str) for t in spelled), "'tokens' must be a list of str")
        _need(isinstance(special, dict), "'special' must map names to ids")
        required = () if kind == 'hf' else SPECIALS + (UNK,) * (kind == 'chars')
        missing = [s for s in required if s not in special]
        _need(not missing, f"'special' lacks {', '.join(missing)}")
        for s, i in special.items():
            _need(s and isinstance(s, str) and type(i) is int and 0 <= i < len(spelled) and not spelled[i],
                  f"the id of special token '{s}' must be a line of 'tokens' that is empty")
        _need(len(set(special.values())) == len(special), 'two special tokens share an id')
        first = {}
        for i, token in enumerate(spelled):
            _need(not token or first.setdefault(token, i) == i, f'token {i} is the same as token {first.get(token)}')
            good = _is_char(token) or not token if kind == 'chars' else all(c in UNSPELL for c in token)
            _need(good, f'token {i} is misspelled: {token!r}')
        system, template = d.get('system'), d.get('chat_template')  # runs before templates had what the system says
        _need(isinstance(system, str | None), "'system' must be a string or null")
        _need(isinstance(template, str | None), "'chat_template' must be a string or null")
        template = template or chatml(system)
        if kind == 'chars':
            return Tokenizer(kind, name, [t.encode() for t in spelled], special, chat_template=template)
        tokens = [bytes([UNSPELL[c] for c in t]) for t in spelled]
        if kind == 'bytes':
            _need(tokens[:256] == [bytes([b]) for b in range(256)] and not any(tokens[256:]),
                  "'tokens' must be the 256 bytes in order")
            return Tokenizer(kind, name, tokens, special, chat_template=template)
        _need(isinstance(pattern, str), "'pattern' must be a string")
        if kind == 'hf':  # as runs had it before HFTokenizer; order: the ids of the tokens, first merges first
            _need(d.get('bos') in (None, *special.values()), "'bos' must be the id of a special token")
            try:
                text = _byte_level_json(tokens, special, pattern, d['order'], d['nfc'], d['bos'])
                return HFTokenizer(name, text, {'chat_template': chatml(system) if d['chat'] else ''}, d['stop_ids'])
            except (KeyError, TypeError, IndexError) as error:
                raise UserError(f"not a tokenizer: {type(error).__name__} {error} in 'order', 'nfc', 'bos', 'chat' or "
                                "'stop_ids'") from None
        _need(len({t for t in tokens if len(t) == 1}) == 256, "'tokens' must hold each of the 256 single bytes")
        return Tokenizer(kind, name, tokens, special, pattern, template)

    def save(self, path):
        """Write one JSON file with a token a line; at every instant `path` is the old file or the whole new one."""
        _write_text(path, json.dumps(self.to_dict(), ensure_ascii=False, indent=0))

    @staticmethod
    def load(path):
        """Read what `save` wrote."""
        d = _read_json(path)
        try:
            return Tokenizer.from_dict(d)
        except UserError as error:
            raise UserError(f'{path}: {error}') from None

    def tokenizer_json(self):
        """The text of a tokenizer.json that makes the same ids."""
        if self.kind == 'chars':
            raise UserError("elsewhere there is no such tokenizer as 'chars': train with 'bpe' or 'bytes' to export")
        return _byte_level_json(self.tokens, self.special, self.pattern)

    def names(self):
        """The tokens that have a role, by the keys of a tokenizer_config.json."""
        return {'eos_token': '<|endoftext|>', 'pad_token': '<|pad|>'}

    def to_hf(self, directory):
        """Write tokenizer.json and what belongs to it: transformers' AutoTokenizer reads the same ids and chats."""
        _write_hf(directory, self.tokenizer_json(), self.names(), {'chat_template': self.chat_template})


def _read_text(path):
    try:
        with open(path, 'rb') as f:
            return f.read().decode()
    except OSError as error:
        raise UserError(f'cannot read {path}: {error.strerror}') from None
    except ValueError as error:
        raise UserError(f'{path}: not UTF-8: {error}') from None


def _read_json(path):
    text = _read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path}: not JSON: {error}') from None


def _write_text(path, text):
    try:
        with open(f'{path}.tmp', 'wb') as f:
            f.write(text.encode())
            f.flush()
            os.fsync(f.fileno())
        os.replace(f'{path}.tmp', path)
    except OSError as error:
        raise UserError(f'cannot write {path}: {error.strerror}') from None


class Stream:
    """push(id) -> the text that is complete by now, flush() -> what is left; never half a UTF-8 character."""

    def __init__(self, tokenizer, start=True):
        self.tokenizer, self.decoder = tokenizer, codecs.getincrementaldecoder('utf-8')('replace')
        self.start = start and tokenizer.strips  # until there is a byte

    def push(self, token):
        data = self.tokenizer.decode_bytes([token])
        if self.start and data:
            self.start, data = False, data.removeprefix(b' ')
        return self.decoder.decode(data)

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
    import regex
    words = Counter()
    split, split_ascii = regex.compile(pattern).findall, None
    if pattern == GPT4_PATTERN:
        split_ascii = re.compile(ASCII_PATTERN, re.ASCII).findall
    # GPT-4's words always end at a newline that no blank follows: there a long text is cut, to stay small in memory.
    next_cut = re.compile(r'\n(?=\S)').search
    for text in counted(texts, 'counting the words', 'texts'):
        start = 0
        while start < len(text):
            cut = next_cut(text, start + 2**16) if split_ascii else None
            end = cut.end() if cut else len(text)
            chunk = text[start:end]
            words.update(split_ascii(chunk) if split_ascii and chunk.isascii() else split(chunk))
            start = end
    return words


def learn_merges(words, n_tokens):  # noqa: C901
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
    progress = Progress('learning merges', 'tokens', n_tokens)
    while len(tokens) < n_tokens and heap:
        n, pair = heapq.heappop(heap)
        if count[pair] != -n:  # other merges ate into this pair since it was pushed: back in line with what is left
            if count[pair]:
                heapq.heappush(heap, (-count[pair], pair))
            continue
        a, b = pair
        new = len(tokens)
        progress(new)
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
    progress.end()
    return tokens, merges


def get_tokenizer(name, texts=None, vocab_size=None):
    """'bytes', 'chars', 'bpe' (these two learn from `texts`, an iterable of str), the name of a tiktoken encoding, or a
    folder with a tokenizer.json, ours or Hugging Face's.

    A tiktoken encoding keeps its own special tokens; those of SPECIALS that it lacks come after its vocabulary.
    """
    if name == 'bytes':
        return bytes_tokenizer()
    if os.path.isdir(name) and name not in ('chars', 'bpe'):
        path = os.path.join(name, 'tokenizer.json')
        own = re.match(r'\s*\{\s*"kind"', _read_text(path))  # which `save` writes first
        return Tokenizer.load(path) if own else hf_tokenizer(name)
    if name in ('chars', 'bpe') and texts is None:
        raise UserError(f"tokenizer '{name}' learns from text and was given none")
    if name == 'chars':
        return chars_tokenizer(texts)
    if name == 'bpe':
        if vocab_size is None:
            raise UserError("tokenizer 'bpe' needs a vocab_size, for example 4096")
        return train_bpe(texts, vocab_size)
    import tiktoken
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


def with_chat_template(tokenizer, name):
    """A tokenizer with one of TEMPLATES or the template in a FILE.jinja, and with the tokens of that which it lacks."""
    if name not in TEMPLATES and not os.path.isfile(name):
        raise UserError(f'chat_template={name!r} is not one of {", ".join(TEMPLATES)}, and no such file')
    source = TEMPLATES.get(name) or _read_text(name)
    known = tokenizer.special if tokenizer.kind != 'hf' else tokenizer.library.get_vocab()
    missing = [token for token in markers_in(source) if token not in known]
    changed = Tokenizer.from_dict(tokenizer.with_tokens(missing) | {'chat_template': source})
    _ = changed.chat  # which says what is wrong with it
    return changed


# ----------------------------------------------------------------------------------------------------------------------
# tokenizers of other people's models

class HFTokenizer(Tokenizer):
    """Somebody else's tokenizer: the `tokenizers` library makes the ids from the text of a tokenizer.json.

    special: the added tokens that are 'special' there, and whatever starts or ends a text or a turn: plain text never
    becomes one. Other added tokens are found in any text, as the library does it. `encode(text, allow_special=True)`
    gives the ids of transformers with add_special_tokens=False. Bytes that are no UTF-8 become U+FFFD.
    """

    def __init__(self, name, text, config, ends=()):
        """text: of a tokenizer.json; config: what is KEPT of tokenizer_config.json, and 'sampling', those of
        SAMPLING that the model has; ends: more ids that end a text."""
        self.kind, self.name, self.text, self.config, self.ends = 'hf', name, text, config, [*ends]
        self.library, self.sampling = _library(text), config.get('sampling') or self.sampling
        _need(isinstance(self.sampling, dict), "'sampling' must be a dict")
        for key, value in self.sampling.items():
            _need(key in SAMPLING and type(value) in (int, float), f'{key}={value!r:.40} of sampling must be a number')
        try:
            self._read(self.library)
        except UserError:
            raise
        except Exception as error:  # the library's own are of no other class
            raise UserError(f'not a tokenizer that can be used: {type(error).__name__} {one_line(error)}') from None

    def _read(self, library):
        vocab, added = library.get_vocab(), {t.content: t for t in library.get_added_tokens_decoder().values()}
        ids, token_of = {*vocab.values()}, library.id_to_token
        self.n_vocab = max(ids, default=0) + 1
        if len(ids) < len(vocab) or self.n_vocab > MAX_VOCAB:
            raise UserError(f"'model.vocab' has one id for two tokens, or an id above {MAX_VOCAB:,}")
        if getattr(library.model, 'dropout', None):
            raise UserError("'model.dropout' makes ids random: set it to null")

        eos, bos = (v['content'] if isinstance(v := self.config.get(key), dict) else v
                    for key in ('eos_token', 'bos_token'))
        ends = [eos, *(token_of(i) for i in self.ends if type(i) is int and i in ids and token_of(i) in added)]
        ends = [vocab[t] for t in ends if t in vocab] or [vocab[t] for t in added if t == '<|endoftext|>']
        if not ends:
            raise UserError("no special token ends a text: name an 'eos_token' in tokenizer_config.json")
        self.eot, self.stop_ids = ends[0], [*dict.fromkeys(ends)]
        plain, whole = (library.encode('a\U000f0000', add_special_tokens=add).ids for add in (False, True))
        self.bos = vocab.get(bos) if self.config.get('add_bos_token') else None
        if len(whole) > len(plain) and whole[0] != plain[0] and token_of(whole[0]) in added:
            self.bos = whole[0]

        own = [token_of(i) for i in (*self.stop_ids, self.bos) if i is not None]
        own += [t for start, end, _ in CHAT_TOKENS for t in (start, end) if t in added]
        self.special = {t: vocab[t] for t in [*(t for t in added if added[t].special), *own]}
        self.special_regex = any_of(self.special)
        self.not_added = [t for t in own if t not in added]
        for t in {*own} & added.keys():
            added[t].special = True
        library.add_special_tokens([added.get(t, t) for t in own])  # their ids stay
        library.encode_special_tokens = True  # like any text
        self.forbidden = {*self.special.values()} - {*plain}  # what cannot be encoded may become <unk>

        steps = _steps(library.decoder) or [step for step in _steps(library.pre_tokenizer) if step == BYTE_LEVEL]
        if not steps or any(step not in DECODERS for step in steps):
            raise UserError(f"'decoder' is {json.dumps(_state(library.decoder))[:200]}, which is not supported")
        self.bytes_of = _TokenBytes(library, self.n_vocab, steps)
        self.prefix = self.decode_bytes(plain).startswith(b' ')  # the blank that SentencePiece puts before a text
        self.anew = not any(step.get('prepend_scheme') == 'first' for step in _steps(library.pre_tokenizer))
        self.strips = any(step['type'] == 'Strip' or step.get('prepend_scheme', 'never') != 'never' for step in steps)

        template = self.config.get('chat_template')
        if isinstance(template, list):
            template = {t['name']: t['template'] for t in template}.get('default')
        for start, end, name in CHAT_TOKENS if template is None else ():
            if {start, end} <= self.special.keys():
                template = TEMPLATES[name]
        if not isinstance(template, str | None):
            raise TypeError(f'chat_template is {type(template).__name__}')
        self.chat_template = template
        if template and 'strftime_now' in template:  # today, for good: a run that goes on tomorrow has the same rows
            self.config.setdefault('date', datetime.date.today().isoformat())

    def _chat_template(self):
        added = [t.content for t in self.library.get_added_tokens_decoder().values()]
        ends = [self.library.id_to_token(i) for i in self.stop_ids]
        return ChatTemplate(self.chat_template, {*added, *self.special}, ends, [*self.special], self.names(),
                            self.config.get('date'))

    @functools.cached_property
    def _with_specials(self):
        """The library's tokenizer that finds special tokens in a text."""
        library = _library(self.text)
        library.add_special_tokens(self.not_added)
        return library

    def encode(self, text, allow_special=False, start=True):
        text = _valid(text, 'replace')
        return self._run(self._with_specials, text, start) if allow_special else self._encode_ordinary(text, start)

    def _encode_ordinary(self, text, start=True):
        return self._guarded(text, self._run(self.library, text, start), start)

    def encode_batch(self, texts, starts=None):
        texts = [_valid(t, 'replace') for t in texts]
        starts = starts if starts and self.prefix else [True] * len(texts)
        rows = [text if start else f'\n{text}' for text, start in zip(texts, starts, strict=True)]  # see `_run`
        known = self.library.encode('\n', add_special_tokens=False).ids
        out = []
        for text, start, encoding in zip(texts, starts, self.library.encode_batch_fast(rows, add_special_tokens=False),
                                         strict=True):
            ids = encoding.ids if start else encoding.ids[len(known):]
            if not start and encoding.ids[:len(known)] != known:
                ids = self._run(self.library, text, start)
            out.append(self._guarded(text, ids, start))
        return out

    def _run(self, library, text, start):
        """The library's ids. A text that goes on follows another one, before which the blank of a start is put."""
        for before in () if start or not self.prefix else '\n.a':
            known, ids = (library.encode(t, add_special_tokens=False).ids for t in (before, before + text))
            if ids[:len(known)] == known:
                return ids[len(known):]
        return library.encode(text, add_special_tokens=False).ids

    def _encode_guarded(self, text, start):
        """Text whose parts meet where GUARD stands, so that no added token is made across it."""
        return [i for n, part in enumerate(text.split(GUARD)) for i in self._encode_ordinary(part, start and not n)]

    def _guarded(self, text, ids, start=True):
        """The ids of plain text without special tokens, which some vocabularies have among their words, too."""
        if self.forbidden.isdisjoint(ids):
            return ids
        ids, end = [], 0
        for cut in [*(name.start() + 1 for name in self.special_regex.finditer(text)), len(text)]:
            ids += self._run(self.library, text[end:cut], start and end == 0)
            end = cut
        return [i for i in ids if i not in self.forbidden]

    def to_dict(self):
        return {'kind': 'hf', 'name': self.name, 'ends': self.ends, 'config': self.config, 'tokenizer_json': self.text}

    def with_tokens(self, names):
        content = json.loads(self.text)
        flags = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
        content['added_tokens'] = content.get('added_tokens', []) + [
            {'id': self.n_vocab + i, 'content': name, 'special': True} | flags for i, name in enumerate(names)]
        return self.to_dict() | {'tokenizer_json': json.dumps(content, ensure_ascii=False)}

    def tokenizer_json(self):
        return self.text

    def names(self):
        names = {key: value['content'] if isinstance(value, dict) else value for key, value in self.config.items()
                 if key.endswith('_token') and key != 'add_bos_token'}
        own = {'eos_token': self.eot} | ({} if self.bos is None else {'bos_token': self.bos})
        return names | {key: self.library.id_to_token(i) for key, i in own.items()}

    def to_hf(self, directory):
        """Write its own tokenizer.json, and what belongs to it so that transformers takes that as it is."""
        config = {key: value for key, value in self.config.items() if key not in ('date', 'sampling')}
        if self.chat_template and 'chat_template' not in config:
            config['chat_template'] = self.chat_template
        _write_hf(directory, self.text, self.names(), config, self.chat_template)


class _TokenBytes(dict):
    """The bytes of the library's tokens by their ids, found when they are asked for; KeyError for what is no id."""

    def __init__(self, library, n_vocab, steps):
        self.library, self.n_vocab = library, n_vocab
        self.byte_level, self.fallback = BYTE_LEVEL in steps, {'type': 'ByteFallback'} in steps

    def __missing__(self, i):
        if not 0 <= i < self.n_vocab:
            raise KeyError(i)
        token = self.library.id_to_token(i) or ''
        if self.byte_level and all(c in UNSPELL for c in token):
            self[i] = bytes([UNSPELL[c] for c in token])
        elif self.fallback and re.fullmatch('<0x[0-9A-Fa-f]{2}>', token):
            self[i] = bytes.fromhex(token[3:5])
        else:
            self[i] = (token if self.byte_level else token.replace('▁', ' ')).encode()
        return self[i]


def _library(text):
    """The text of a tokenizer.json -> a Tokenizer of the library, which reads it and runs nothing that is in there."""
    import tokenizers  # here, for most commands do without
    try:
        library = tokenizers.Tokenizer.from_str(text)
    except BaseException as error:  # what the library calls a panic is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        raise UserError(f'not a tokenizer.json of Hugging Face: {one_line(error)}') from None
    library.no_truncation()  # which are settings for batches, and would cut or pad a text
    library.no_padding()
    return library


def _state(part):
    """A normalizer, pre-tokenizer or decoder of the library -> its dict, without what is of no interest to ids."""
    def hook(d):
        return d | {'trim_offsets': True} if 'trim_offsets' in d else d
    return None if part is None else json.loads(part.__getstate__(), object_hook=hook)


def _flat(part):
    """The dicts of the steps of a normalizer, pre-tokenizer or decoder."""
    d = _state(part) or {}
    return next((d[key] for key in ('normalizers', 'pretokenizers', 'decoders') if key in d), [d] * bool(d))


def _steps(part):
    """As `_flat`, of a decoder or what stands for one: of how it cuts text in words nothing matters."""
    return [BYTE_LEVEL if step['type'] == 'ByteLevel' else step for step in _flat(part)]


def hf_tokenizer(directory):
    """A tokenizer of Hugging Face (Llama, Mistral, Qwen, Gemma, SmolLM2 …): the folder that has the tokenizer.json."""
    path = os.path.join(directory, 'tokenizer.json')
    text, found = _read_text(path), {}
    for name in ('tokenizer_config.json', 'generation_config.json', 'config.json', 'chat_template.jinja'):
        file = os.path.join(directory, name)
        if os.path.exists(file):
            found[name] = _read_json(file) if name.endswith('json') else _read_text(file)
    config, generation = found.get('tokenizer_config.json', {}), found.get('generation_config.json')
    try:
        ends = (generation or found.get('config.json', {})).get('eos_token_id')
        kept = {key: config[key] for key in KEPT if config.get(key) is not None}
        if generation and generation.get('do_sample'):
            kept['sampling'] = {key: generation[key] for key in SAMPLING if generation.get(key) is not None}
        if 'chat_template.jinja' in found:
            kept['chat_template'] = found['chat_template.jinja']
        listed = re.search(r'"added_tokens"\s*:\s*(?=\[)', text)  # not all of the text is parsed: it is long
        listed = json.JSONDecoder().raw_decode(text, listed.end())[0] if listed else []
        listed = [(t['content'], t['id']) for t in listed]
        listed += [(t['content'], int(i)) for i, t in config.get('added_tokens_decoder', {}).items()]
        name = os.path.basename(os.path.abspath(directory))
        tokenizer = HFTokenizer(name, text, kept, ends if isinstance(ends, list) else [ends])
        ids = {t.content: i for i, t in tokenizer.library.get_added_tokens_decoder().items()}
        for token, i in listed:
            if ids.get(token) != i:
                raise UserError(f'added token {token!r} has the id {i}, the tokenizers library makes that '
                                f'{ids.get(token)}: set it so')
    except UserError as error:
        raise UserError(f'{path}: {error}') from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f'{path}: not a tokenizer.json of Hugging Face: {type(error).__name__} {error}') from None
    return tokenizer


def gguf_tokenizer(fields):
    """The tokenizer of a GGUF file, whose metadata is the dict `fields`: 'tokenizer.ggml.tokens' and its like.

    'gpt2' is byte-level BPE, cut into words as 'tokenizer.ggml.pre' says; 'llama' is SentencePiece's BPE, whose merges
    follow from the scores of the tokens where the file has none, as transformers makes them.
    """
    get = {key.removeprefix('tokenizer.ggml.'): value for key, value in fields.items()}.get
    for key, known in [('model', ('gpt2', 'llama')), *[('pre', GGUF_PRE)] * (get('model') == 'gpt2')]:
        if get(key) not in known:
            raise UserError(f"'tokenizer.ggml.{key}' is '{get(key)}', which is not supported: only {', '.join(known)}")
    for key in ('tokens', 'merges' if get('model') == 'gpt2' or get('scores') is None else 'scores'):
        if get(key) is None:
            raise UserError(f"'tokenizer.ggml.{key}' is missing")
    tokens, types, merges = get('tokens'), [*map(int, get('token_type', []))], get('merges')
    types += [1] * (len(tokens) - len(types))  # 2: unknown, 3: control, 4: the user's, 5: unused, 6: a byte
    vocab = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != 5}
    if len(vocab) != len(tokens) - types.count(5):
        raise UserError("'tokenizer.ggml.tokens' has a token twice")
    if get('model') == 'gpt2':
        pattern, nfc, starts = GGUF_PRE[get('pre')]
        d = {'normalizer': {'type': 'NFC'} if nfc else None, 'pre_tokenizer': _pre_tokenizer(pattern),
             'decoder': BYTE_LEVEL, 'model': {'type': 'BPE', 'vocab': vocab, 'merges': merges, 'ignore_merges': starts}}
    else:
        unknown = next((t for t, i in vocab.items() if i == get('unknown_token_id', 0)), None)
        d, starts = _sentencepiece(vocab, merges, get('scores'), get('add_space_prefix', True), unknown), True
    special = {token: types[i] != 4 for token, i in vocab.items() if types[i] in (2, 3, 4)}
    bos = get('bos_token_id') if get('add_bos_token', starts) else None
    ends = [i for key in ('eos', 'eot', 'eom') if (i := get(f'{key}_token_id')) is not None]
    if not {*ends} & {vocab[t] for t in special} and '<|endoftext|>' not in special:
        raise UserError("no special token ends a text: 'tokenizer.ggml.eos_token_id' is none")
    template = fields.get('tokenizer.chat_template')
    asked = {ours: fields.get(f'general.sampling.{theirs}') for ours, theirs in SAMPLING.items()}
    asked = {key: round(value, 6) for key, value in asked.items() if isinstance(value, (int, float))}
    config = {'chat_template': template, 'sampling': asked,
              'bos_token': next((token for token in special if vocab[token] == get('bos_token_id')), None)}
    return HFTokenizer(fields.get('general.name', 'gguf'), _tokenizer_json(d, vocab, special, bos),
                       {key: value for key, value in config.items() if value not in (None, {})}, map(int, ends))


def gguf_vocabulary(tokenizer, n_vocab):
    """The inverse of `gguf_tokenizer`: the metadata of a tokenizer whose model has n_vocab embeddings.

    UserError for one whose ids llama.cpp would not make, by the key of its tokenizer.json.
    """
    text = tokenizer.tokenizer_json()
    d, library = json.loads(text), _library(text)
    if d['model'].get('type') != 'BPE':
        raise UserError(f"'model.type' is {d['model'].get('type')!r}: of others' tokenizers only BPE can be exported")
    for key in ('continuing_subword_prefix', 'end_of_word_suffix'):
        if d['model'].get(key):
            raise UserError(f"'model.{key}' is {d['model'][key]!r}, which llama.cpp does not know")
    vocab, added = d['model']['vocab'], d.get('added_tokens') or []
    tokens, types = [f'[PAD{i}]' for i in range(n_vocab)], [5] * n_vocab  # what has no text is not in use
    pieces = bool(d['model'].get('byte_fallback'))
    for token, i in vocab.items():
        tokens[i], types[i] = token, 6 if pieces and re.fullmatch('<0x[0-9A-F]{2}>', token) else 1
    for t in added:
        tokens[t['id']], types[t['id']] = t['content'], 4
        flag = next((flag for flag in ('lstrip', 'rstrip', 'single_word') if t.get(flag)), None)
        if flag:
            raise UserError(f"added token {t['content']!r} has {flag}=true, which llama.cpp does not know")
    for i in tokenizer.special.values():
        types[i] = 3
    if len({*tokens}) < n_vocab:
        raise UserError(f'two ids have the text {Counter(tokens).most_common(1)[0][0]!r}')
    fields = {'tokens': tokens, 'token_type': types} | (
        _pieces_of(tokenizer, d, library, tokens, types) if pieces else _cuts_of(tokenizer, d, library))
    names = {key: library.token_to_id(token) for key, token in tokenizer.names().items()}
    ends = tokenizer.turn_ids
    first = next(i for i in (tokenizer.bos, names.get('bos_token'), ends[0]) if i is not None)
    fields |= {'add_bos_token': tokenizer.bos is not None, 'bos_token_id': first, 'eos_token_id': ends[0],
               'eot_token_id': ends[min(1, len(ends) - 1)]}  # given, or llama.cpp guesses by names
    for key, i in (('eom_token_id', ends[2] if len(ends) > 2 else None),
                   ('padding_token_id', names.get('pad_token'))):
        if i is not None:
            fields[key] = i
    fields = {f'tokenizer.ggml.{key}': value for key, value in fields.items()}
    own = getattr(tokenizer, 'config', {}).get('sampling', {})
    own = {SAMPLING[key]: value if key == 'top_k' else float(value) for key, value in own.items()}
    fields |= {f'general.sampling.{key}': value for key, value in own.items()}
    return fields | ({'tokenizer.chat_template': tokenizer.chat_template} if tokenizer.chat_template else {})


def _cuts_of(tokenizer, d, library):
    """Of a byte-level BPE what `gguf_vocabulary` gives beside its tokens."""
    model, vocab = d['model'], d['model']['vocab']
    if model.get('unk_token') and not {*UNSPELL} <= vocab.keys():
        raise UserError(f"'model.unk_token' is {model['unk_token']!r}: llama.cpp leaves bytes out that have no token")
    if _flat(library.normalizer) not in ([], [{'type': 'NFC'}]):
        raise UserError(f"'normalizer' is {json.dumps(_state(library.normalizer))[:100]}, which llama.cpp has not")
    found = {}
    for name, (pattern, _, starts) in GGUF_PRE.items():
        cuts = _pre_tokenizer(pattern)
        if cuts.get('pretokenizers', [cuts]) == _flat(library.pre_tokenizer):
            found[starts] = name
    if not found:
        raise UserError(f"tokenizer {tokenizer.name} cuts text as llama.cpp does for no model ('pre_tokenizer'): it "
                        f"can as {', '.join(GGUF_PRE)} do: train with one of these, such as 'bpe' or 'gpt2'")
    starts = bool(model.get('ignore_merges'))
    if starts not in found:  # then only where this changes nothing
        other = _library(json.dumps(d | {'model': model | {'ignore_merges': not starts}}))
        specials = {t['content'] for t in d.get('added_tokens') or []}
        for token in vocab.keys() - specials:
            if [t.id for t in library.model.tokenize(token)] != [t.id for t in other.model.tokenize(token)]:
                raise UserError(f"'model.ignore_merges' is {str(starts).lower()}, with which token {token!r} is made "
                                f"otherwise than llama.cpp does")
    merges = [merge if isinstance(merge, str) else ' '.join(merge) for merge in model['merges']]
    return {'model': 'gpt2', 'pre': found.get(starts) or found[not starts], 'merges': merges}


BLANKS_TO_LINES = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '▁'}
BLANK_FIRST = {'type': 'Sequence', 'normalizers': [{'type': 'Prepend', 'prepend': '▁'}, BLANKS_TO_LINES]}


def _pieces_of(tokenizer, d, library, tokens, types):
    """Of SentencePiece's BPE what `gguf_vocabulary` gives beside its tokens, whose types it completes."""
    normalizer, cuts = _flat(library.normalizer), _flat(library.pre_tokenizer)
    for step in cuts:
        idle = step['type'] == 'Split' and step['pattern'] == {'String': ' '}  # of which the normalizer leaves none
        never = step['type'] == 'Metaspace' and step['prepend_scheme'] == 'never' and not step['split']
        if not (idle and normalizer or never):
            raise UserError(f"'pre_tokenizer' is {json.dumps(step, ensure_ascii=False)[:150]}: llama.cpp cuts no words "
                            'here, and has a blank before every text after a special token, or before none')
    if normalizer not in ([BLANKS_TO_LINES], BLANK_FIRST['normalizers'], *[[]] * bool(cuts)):
        raise UserError(f"'normalizer' is {json.dumps(normalizer, ensure_ascii=False)[:150]}, which llama.cpp has not")
    vocab, scores = d['model']['vocab'], [-1e6] * len(tokens)
    pairs = [tuple(merge.split(' ') if isinstance(merge, str) else merge) for merge in d['model']['merges']]
    merged = [''.join(pair) for pair in pairs]
    for n, token in reversed([*enumerate(merged)]):
        scores[vocab[token]] = -float(n)
    # scores say in which order tokens are merged, of any two halves: then the list must say the same
    if {*pairs} != _halves(vocab) or len([*itertools.groupby(merged)]) != len({*merged}):
        raise UserError("'model.merges' are not what scores of tokens say, by which llama.cpp merges: only merges that "
                        'SentencePiece has learned are')
    fields = {'model': 'llama', 'pre': 'default', 'scores': scores,
              'add_space_prefix': normalizer == BLANK_FIRST['normalizers']}
    unknown = vocab.get(d['model'].get('unk_token'))
    if unknown is not None:
        fields['unknown_token_id'], types[unknown] = unknown, 2
    return fields


def _halves(vocab):
    """The pairs of tokens that make a token, a set."""
    return {(token[:k], token[k:]) for token in vocab for k in range(1, len(token))
            if token[:k] in vocab and token[k:] in vocab}


def _sentencepiece(vocab, merges, scores, blank_first, unknown):
    """SentencePiece's BPE, its parts in a tokenizer.json. merges: None to find them by the scores of the tokens."""
    if merges is None:
        of = {ab: vocab[ab[0] + ab[1]] for ab in _halves(vocab)}
        merges = sorted(of, key=lambda ab: (-scores[of[ab]], of[ab], vocab[ab[0]], vocab[ab[1]]))
    blanks = BLANK_FIRST if blank_first else BLANKS_TO_LINES
    decoder = {'type': 'Sequence', 'decoders': DECODERS[1:4 + bool(blank_first)]}
    return {'normalizer': blanks, 'decoder': decoder, 'model': {
        'type': 'BPE', 'vocab': vocab, 'merges': merges, 'unk_token': unknown, 'fuse_unk': True, 'byte_fallback': True}}


# ----------------------------------------------------------------------------------------------------------------------
# the format of Hugging Face, written

def _pre_tokenizer(pattern):
    """How text is cut into words by a pattern, and these are spelled in bytes: part of a tokenizer.json."""
    if pattern == GPT2_PATTERN:
        return BYTE_LEVEL
    cut = {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False}
    if pattern == SMOLLM_PATTERN:
        cut = {'type': 'Digits', 'individual_digits': True}
    return {'type': 'Sequence', 'pretokenizers': [cut, BYTE_LEVEL | {'use_regex': pattern == SMOLLM_PATTERN}]}


def _tokenizer_json(d, vocab, special, bos=None):
    """The text of a tokenizer.json: d and its added tokens, special: {token: whether it is a special one}."""
    flags = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
    added = [{'id': vocab[t], 'content': t, 'special': special[t]} | flags for t in sorted(special, key=vocab.get)]
    post = None
    if bos in vocab.values():
        name, text = next(t for t, i in vocab.items() if i == bos), {'Sequence': {'id': 'A', 'type_id': 0}}
        first = {'SpecialToken': {'id': name, 'type_id': 0}}
        post = {'type': 'TemplateProcessing', 'single': [first, text], 'pair': [first, text, text],
                'special_tokens': {name: {'id': name, 'ids': [bos], 'tokens': [name]}}}
    return json.dumps({'version': '1.0', 'added_tokens': added, 'post_processor': post} | d, ensure_ascii=False)


def _byte_level_json(tokens, special, pattern, order=None, nfc=False, bos=None):
    """A byte-level BPE of ours as the text of a tokenizer.json. order: the ids of tokens, first merges first."""
    from tiktoken_ext.openai_public import r50k_pat_str
    spell = {token: ''.join([SPELLING[b] for b in token]) for token in tokens if token}
    rank = {tokens[i]: n for n, i in enumerate(order or range(len(tokens))) if tokens[i]}
    merges = [_parts(token, rank) for token in rank if len(token) > 1]
    vocab = {spell[token]: i for i, token in enumerate(tokens) if token} | special
    if pattern in (None, '', r50k_pat_str):  # to bytes alone any cuts will do
        cut = BYTE_LEVEL
    elif pattern in [known for known, _, _ in GGUF_PRE.values()]:
        cut = _pre_tokenizer(pattern)
    else:
        # Oniguruma's `$` ends a line and its `{1,3}+` is no possessive one. What does not match is removed.
        onig = re.sub(r'(\\p\{\w+\}|\[[^]]*\]|\\?.)(\{[\d,]+\})\+', r'(?>\1\2)', pattern)
        cut = _pre_tokenizer(onig.replace('$', r'(?![\s\S])'))
        cut['pretokenizers'][0] |= {'behavior': 'Removed', 'invert': True}
    d = {'normalizer': {'type': 'NFC'} if nfc else None, 'pre_tokenizer': cut, 'decoder': BYTE_LEVEL, 'model': {
        'type': 'BPE', 'ignore_merges': len(rank) == len(spell), 'vocab': vocab,
        'merges': [f'{spell[m[0]]} {spell[m[1]]}' for m in merges if len(m) == 2]}}
    return _tokenizer_json(d, vocab, dict.fromkeys(special, True), bos)


def _parts(token, rank):
    """What BPE makes of a token's bytes by the merges of rank before its own: the two that it is merged from."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        n, i = min([(rank.get(parts[i] + parts[i + 1], rank[token]), i) for i in range(len(parts) - 1)])
        if n >= rank[token]:
            break
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _write_hf(directory, text, names, config, template=None):
    """The files of a tokenizer there. names: {role: token}; template: that of chats, where config has more than one."""
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError as error:
        raise UserError(f'cannot write {directory}: {error.strerror}') from None
    config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False} | config | names
    _write_text(os.path.join(directory, 'tokenizer.json'), text)
    for name, values in (('tokenizer_config', config), ('special_tokens_map', names)):
        _write_text(os.path.join(directory, f'{name}.json'), json.dumps(values, ensure_ascii=False, indent=0))
    if template := template or config.get('chat_template'):  # where transformers looks first since version 4.51
        _write_text(os.path.join(directory, 'chat_template.jinja'), template)
