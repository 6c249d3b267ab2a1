"""Text <-> token ids: bytes, characters, a BPE trained here, any tiktoken encoding, any byte-level BPE of Hugging Face.

    tokenizer = get_tokenizer('bpe', texts, vocab_size=4096)
    ids = tokenizer.encode('To be, or not to be')
    tokenizer.decode(ids)
    tokenizer = hf_tokenizer('SmolLM2-135M-Instruct')  # the folder that has the tokenizer.json
    ids, mask = tokenizer.chat_ids([{'role': 'user', 'content': 'Hi'}], generate=True)

BPE (arXiv:1508.07909) on bytes as in GPT-2: `train_bpe` learns the merges here; encoding with them is tiktoken's work.
The calculator that an assistant may call in its answers is here, too: chats are tokenised around its results.
"""

import codecs
import difflib
import gc
import hashlib
import heapq
import json
import os
import re
import unicodedata
from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np


class UserError(ValueError):
    """A mistake that the person at the keyboard can mend: one line that names what is wrong and the remedy."""


SPECIALS = ('<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|pad|>')
UNK = '<unk>'  # what `chars` makes of a character that its text did not have
KINDS = ('bytes', 'chars', 'bpe', 'tiktoken', 'hf')
ROLES = ('system', 'user', 'assistant', 'tool')

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
            'qwen2': (QWEN2_PATTERN, True, False), 'llama-bpe': (GPT4_PATTERN, False, True)}
# What Hugging Face's regular expressions (Oniguruma) and tiktoken's read differently.
DIALECT = re.compile(r'(?<!\[)\^|\$|\}\+|\\[AbBGhHkKRwWXyYzZ]|&&|\(\?[^:=!<>i]')
# The system's message that a chat template has as a constant: no quote closes in it.
DEFAULT_SYSTEM = r"""<\|im_start\|>system(?:\n|\\n)((?:(?!<\|im_|['"] *[-+~}]).)+)<\|im_end\|>"""
# GPT-2's printable spelling of a byte: itself where Latin-1 can show it, else the next letter from U+0100 on ('Ġ' is a
# space). The base tokens have this order too, so that ties between equally frequent pairs fall as in GPT-2's own files.
PRINTABLE = [b for b in range(256) if chr(b).isprintable() and chr(b) != ' ']
BYTE_ORDER = PRINTABLE + sorted(set(range(256)) - set(PRINTABLE))
SPELLING = {b: chr(b if b in PRINTABLE else 256 + rank - len(PRINTABLE)) for rank, b in enumerate(BYTE_ORDER)}
UNSPELL = {char: b for b, char in SPELLING.items()}

# tiktoken dies of a million blanks in a row and knows valid UTF-8 only: such places are cut out before it sees text.
BLANKS = 500_000
AWKWARD = re.compile(rf'(\s{{{BLANKS}}}|[\udc80-\udcff]+)')

# What an assistant writes to have something calculated, and the same with the result that is put in after it.
CALL = re.compile('<tool>((?:(?!</?tool>).)*)</tool>', re.S)
ANSWERED_CALL = re.compile(rf'{CALL.pattern}(\[[^][\n]*\])', re.S)
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


class Tokenizer:
    """Ids 0 … n_vocab-1 <-> text. Made by `get_tokenizer` and its like or `load`, not by hand.

    tokens: the bytes of every id in order, b'' where the id is a special token (or not in use); special: name -> id.
    eot, stop_ids: the ids that end a text; bos: the id that starts one, or None; chat: whether chats are ChatML;
    system: what the system says in a chat where it says nothing. Of kind 'hf' only, nfc: text becomes NFC first;
    order: the ids that encoding makes, first merges first.
    """

    def __init__(self, kind, name, tokens, special, pattern=None, *, eot=None, bos=None, stop_ids=None, order=None,
                 nfc=False, chat=True, system=None):
        self.kind, self.name, self.tokens, self.special, self.pattern = kind, name, tokens, special, pattern
        self.n_vocab = len(tokens)
        self.eot = special['<|endoftext|>'] if eot is None else eot
        self.stop_ids, self.bos, self.order, self.nfc = stop_ids or [self.eot], bos, order, nfc
        self.chat, self.system = chat, system
        self.bytes_of = dict(enumerate(tokens)) | {i: _utf8(s) for s, i in special.items()}
        self.special_regex = re.compile('(' + '|'.join(map(re.escape, sorted(special, key=len, reverse=True))) + ')')
        if kind == 'chars':
            self.id_of = {token.decode(): i for i, token in enumerate(tokens) if token}
        elif kind != 'bytes':
            import regex
            import tiktoken  # here, for most commands do without
            self.id_of = {token: i for i, token in enumerate(tokens) if token}
            # tiktoken merges by rank; where ids are in another order it sees the ranks, and `_ids` makes them ids.
            ranks = self.id_of if order is None else {tokens[i]: rank for rank, i in enumerate(order)}
            self.lost = bytes(b for b in range(256) if bytes([b]) not in ranks)
            try:
                self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
                self.words = regex.compile(pattern)
            except (ValueError, regex.error) as error:
                raise UserError(f"'pattern' is no regular expression: {' '.join(str(error).split())}") from None
            if self.words.match(''):  # of which tiktoken would die
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

    def _ids(self, ranks):
        return ranks if self.order is None else [self.order[rank] for rank in ranks]

    def _encode_ordinary(self, text):
        if self.kind == 'bytes':
            return list(text.encode('utf-8', 'surrogateescape'))
        if self.kind == 'chars':
            return [self.id_of.get(char, self.special[UNK]) for char in text]
        if self.nfc:
            text = unicodedata.normalize('NFC', text)
        ids, data = [], text.encode('utf-8', 'surrogateescape') if self.lost else b''
        if len(data.translate(None, self.lost)) < len(data):  # Hugging Face drops such bytes after cutting into words
            for word in self.words.finditer(text):
                if data := word.group().encode('utf-8', 'surrogateescape').translate(None, self.lost):
                    ids += self._ids(self.encoding._encode_single_piece(data))
            return ids
        if text.isascii() and len(text) < BLANKS:
            return self._ids(self.encoding.encode_ordinary(text))
        for part in AWKWARD.split(text):
            if part and '\udc80' <= part[0] <= '\udcff':
                ids += [self.id_of[bytes([b])] for b in part.encode('utf-8', 'surrogateescape')]
            else:
                ids += self._ids(self.encoding.encode_ordinary(part))
        return ids

    def encode_batch(self, texts):
        """An iterable of ordinary texts -> a list of their ids; tiktoken's threads where no text needs special care."""
        texts = list(texts)
        simple = self.kind in ('bpe', 'tiktoken', 'hf') and not self.nfc and not self.lost
        if simple and all(isinstance(t, str) and len(t) < BLANKS for t in texts):
            return [*map(self._ids, self.encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count()))]
        return [self.encode(t) for t in texts]

    @property
    def turn_ids(self):
        """The ids that end an assistant's turn: of a chat, or a text."""
        return [*dict.fromkeys([*self.stop_ids, self.special.get('<|im_end|>', self.eot)])]

    def _has_chat(self):
        return self.chat and {'<|im_start|>', '<|im_end|>'} <= self.special.keys()

    def chat_ids(self, messages, generate=False):
        """A chat, a list of {'role': …, 'content': …} -> (ids, mask) in ChatML; content is ordinary text throughout.

        mask is 1 on the tokens that the assistant has to produce, its content and its <|im_end|>, and 0 elsewhere.
        generate: end with the header of the assistant's next message, which may be the first.

        In what the assistant says, the result of a call, '[7]' in '<tool>26 - 19</tool>[7]', is a text of its own and
        mask is 0 on it, since generation puts it in between what the model writes before and after (see `rollout.py`).
        """
        if not self._has_chat():
            raise UserError(f'tokenizer {self.name} has no chats in ChatML (<|im_start|> … <|im_end|>): '
                            'take that of an instruct model that has')
        if not isinstance(messages, list) or not (messages or generate):
            raise UserError("a chat must be a list of at least one {'role': …, 'content': …}")
        for i, m in enumerate(messages):
            if not isinstance(m, dict) or not isinstance(m.get('content'), str) or m.get('role') not in ROLES:
                raise UserError(f"message {i} of the chat must have a 'role' ({', '.join(ROLES)}) and a 'content' that "
                                f'is a string')
        if self.system is not None and [m['role'] for m in messages[:1]] != ['system']:
            messages = [{'role': 'system', 'content': self.system}, *messages]
        start, end, newline = self.special['<|im_start|>'], self.special['<|im_end|>'], self.encode('\n')
        header, ids, mask = [start, *self.encode('assistant\n')], [], []
        for m in messages:
            if m['role'] == 'assistant':  # apart from its header, as when it is generated
                content, counts = self._answer_ids(m['content'])
                ids += header + content + [end] + newline
                mask += [0] * len(header) + counts + [1] + [0] * len(newline)
            else:
                ids += [start, *self.encode(f"{m['role']}\n{m['content']}"), end, *newline]
                mask += [0] * (len(ids) - len(mask))
        return (ids + header, mask + [0] * len(header)) if generate else (ids, mask)

    def _answer_ids(self, content):
        """What the assistant says -> its ids, and 1 for those that it has to produce, 0 for results of calls."""
        ids, counts, end = [], [], 0
        for call in ANSWERED_CALL.finditer(content):
            said, result = self.encode(content[end:call.start(2)]), self.encode(call[2])
            ids, counts, end = ids + said + result, counts + [1] * len(said) + [0] * len(result), call.end()
        rest = self.encode(content[end:])
        return ids + rest, counts + [1] * len(rest)

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
        more = HF_FIELDS if self.kind == 'hf' else {'system': 0} if self.system else {}
        return {'kind': self.kind, 'name': self.name, 'special': dict(self.special), 'pattern': self.pattern or '',
                'tokens': [spell(token) for token in self.tokens]} | {key: getattr(self, key) for key in more}

    def same_as(self, other):
        """Whether another tokenizer, or its `to_dict`, makes the same of every text, whatever it is called."""
        own, other = ({key: value for key, value in d.items() if key != 'name'}
                      for d in (self.to_dict(), other if isinstance(other, dict) else other.to_dict()))
        return own == other

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
        required = () if kind == 'hf' else SPECIALS + (UNK,) * (kind == 'chars')
        missing = [s for s in required if s not in special]
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
        more = {key: d[key] for key in (HF_FIELDS if kind == 'hf' else ['system']) if key in d}
        if kind == 'hf':
            need(more.keys() == HF_FIELDS.keys(), f"'hf' lacks {', '.join(HF_FIELDS.keys() - more.keys())}")
            ends, order = more['stop_ids'], more['order']
            need(isinstance(ends, list) and {*map(repr, [more['eot'], *ends])} <= {*map(repr, special.values())},
                 "'eot' and 'stop_ids' must be ids of special tokens")
            need(more['bos'] is None or more['bos'] in special.values(), "'bos' must be the id of a special token")
            need(isinstance(order, list) and all(type(i) is int and 0 <= i < len(spelled) and spelled[i] for i in order)
                 and len(set(order)) == len(order) > 0, "'order' must list ids of tokens, each once")
            need(type(more['nfc']) is type(more['chat']) is bool, "'nfc' and 'chat' must be true or false")
        need(isinstance(more.get('system'), str | None), "'system' must be a string or null")
        if kind == 'chars':
            return Tokenizer(kind, name, [t.encode() for t in spelled], special, **more)
        tokens = [bytes([UNSPELL[c] for c in t]) for t in spelled]
        if kind == 'bytes':
            need(tokens[:256] == [bytes([b]) for b in range(256)] and not any(tokens[256:]),
                 "'tokens' must be the 256 bytes in order")
            return Tokenizer(kind, name, tokens, special, **more)
        need(kind == 'hf' or len({t for t in tokens if len(t) == 1}) == 256,
             "'tokens' must hold each of the 256 single bytes")
        need(isinstance(pattern, str), "'pattern' must be a string")
        return Tokenizer(kind, name, tokens, special, pattern, **more)

    def save(self, path):
        """Write one JSON file with a token a line; at every instant `path` is the old file or the whole new one."""
        _write_json(path, self.to_dict())

    @staticmethod
    def load(path):
        """Read what `save` wrote."""
        d = _read_json(path)
        try:
            return Tokenizer.from_dict(d)
        except UserError as error:
            raise UserError(f'{path}: {error}') from None

    def to_hf(self, directory):
        """Write tokenizer.json and tokenizer_config.json: transformers' AutoTokenizer reads the same ids from them."""
        if self.kind == 'chars':
            raise UserError("Hugging Face has no such tokenizer as 'chars': train with 'bpe' or 'bytes' to export")
        from tiktoken_ext.openai_public import r50k_pat_str
        spell = {token: ''.join([SPELLING[b] for b in token]) for token in self.tokens if token}
        rank = {self.tokens[i]: n for n, i in enumerate(self.order or range(self.n_vocab)) if self.tokens[i]}
        merges = [_parts(token, rank, rank[token]) for token in rank if len(token) > 1]
        vocab = {spell[token]: i for i, token in enumerate(self.tokens) if token} | self.special
        cut = bytelevel = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
        if self.pattern == SMOLLM_PATTERN:
            cut = {'type': 'Sequence', 'pretokenizers': [{'type': 'Digits', 'individual_digits': True}, cut]}
        elif self.pattern not in (None, GPT2_PATTERN, r50k_pat_str):  # to bytes alone any cuts will do
            # Oniguruma's `$` ends a line and its `{1,3}+` is no possessive one. What does not match is removed.
            onig = re.sub(r'(\\p\{\w+\}|\[[^]]*\]|\\?.)(\{[\d,]+\})\+', r'(?>\1\2)', self.pattern)
            how = ('Isolated', False) if onig in (GPT4_PATTERN, QWEN2_PATTERN) else ('Removed', True)
            cut = {'type': 'Sequence', 'pretokenizers': [
                {'type': 'Split', 'pattern': {'Regex': onig.replace('$', r'(?![\s\S])')}, 'behavior': how[0],
                 'invert': how[1]}, cut | {'use_regex': False}]}
        names, text = {i: s for s, i in self.special.items()}, {'Sequence': {'id': 'A', 'type_id': 0}}
        config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False,
                  'eos_token': names[self.eot]}
        if '<|pad|>' in self.special:
            config['pad_token'] = '<|pad|>'
        post = None
        if self.bos is not None:
            bos = config['bos_token'] = names[self.bos]
            post = {'type': 'TemplateProcessing', 'single': [{'SpecialToken': {'id': bos, 'type_id': 0}}, text],
                    'pair': [text, text], 'special_tokens': {bos: {'id': bos, 'ids': [self.bos], 'tokens': [bos]}}}
        if self._has_chat():
            system = '' if self.system is None else (
                "{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\n"
                + re.sub(r"(['\\])", r'\\\1', self.system) + "<|im_end|>\n' }}{% endif %}")
            config['chat_template'] = (
                '{% for message in messages %}' + system + "{{ '<|im_start|>' + message['role'] + '\n' + "
                "message['content'] + '<|im_end|>\n' }}{% endfor %}"
                "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
        flags = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False) | {'special': True}
        hf = {'version': '1.0', 'added_tokens': [{'id': i, 'content': names[i]} | flags for i in sorted(names)],
              'normalizer': {'type': 'NFC'} if self.nfc else None, 'pre_tokenizer': cut, 'post_processor': post,
              'decoder': bytelevel, 'model': {
                  'type': 'BPE', 'ignore_merges': len(rank) == len(spell), 'vocab': vocab,
                  'merges': [f'{spell[m[0]]} {spell[m[1]]}' for m in merges if len(m) == 2]}}
        try:
            os.makedirs(directory, exist_ok=True)
        except OSError as error:
            raise UserError(f'cannot write {directory}: {error.strerror}') from None
        _write_json(os.path.join(directory, 'tokenizer.json'), hf)
        _write_json(os.path.join(directory, 'tokenizer_config.json'), config)


HF_FIELDS = dict.fromkeys(('eot', 'bos', 'stop_ids', 'order', 'nfc', 'chat', 'system'))


def _read_json(path):
    try:
        with open(path, encoding='utf-8') as f:
            return json.load(f)
    except OSError as error:
        raise UserError(f'cannot read {path}: {error.strerror}') from None
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path}: not JSON: {error}') from None


def _write_json(path, d):
    try:
        with open(f'{path}.tmp', 'w', encoding='utf-8') as f:
            json.dump(d, f, ensure_ascii=False, indent=0)
            f.flush()
            os.fsync(f.fileno())
        os.replace(f'{path}.tmp', path)
    except OSError as error:
        raise UserError(f'cannot write {path}: {error.strerror}') from None


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
    import regex
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
    """'bytes', 'chars', 'bpe' (these two learn from `texts`, an iterable of str), the name of a tiktoken encoding, or a
    folder with a tokenizer.json, ours or Hugging Face's.

    A tiktoken encoding keeps its own special tokens; those of SPECIALS that it lacks come after its vocabulary.
    """
    if name == 'bytes':
        return bytes_tokenizer()
    if os.path.isdir(name):
        path = os.path.join(name, 'tokenizer.json')
        return Tokenizer.load(path) if 'kind' in _read_json(path) else hf_tokenizer(name)
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


def _parts(token, rank, limit):
    """What BPE makes of a token's bytes by the merges of rank below limit: below its own, the two it is merged from."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        n, i = min([(rank.get(parts[i] + parts[i + 1], limit), i) for i in range(len(parts) - 1)])
        if n >= limit:
            break
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def bpe_tokenizer(name, vocab, merges, special, pattern, nfc=False, ignore_merges=False, ends=(), template=None,
                  bos=None):
    """A Tokenizer of kind 'hf' from what a tokenizer.json or a GGUF file has.

    vocab: {token in GPT-2's spelling: id}; merges: its pairs of tokens, 'a b' or [a, b], first merges first;
    special: {text: id}, which may be in vocab too; ends: ids that end a text, None and unknown ones are passed over;
    template: the chat template, read but not run. UserError where tiktoken would make other ids.

    Hugging Face merges the pairs listed and tiktoken whatever adds up to a token, lowest rank first, so they agree
    (1) if every two tokens that add up to a third are listed, and whole words looked up (Llama 3); or (2) if no merge
    comes before those of its parts, and each token, cut by the merges before its own, becomes a pair listed: all lower
    merges done, its bytes look in every word as they look on their own. No other token ever comes about in a word.
    """
    ids = {i: token for token, i in (vocab | special).items()}
    for token, i in [*vocab.items(), *special.items()]:
        if type(i) is not int or not 0 <= i < 10**7 or ids[i] != token:
            raise UserError(f'token {token!r} has the id {i!r}, which is taken or none')
        if token not in special and not all(c in UNSPELL for c in token) or not token:
            raise UserError(f'token {i}, {token!r}, is not spelled as in byte-level BPE')
    tokens = [b''] * (max(ids, default=0) + 1)
    unspell = {token: bytes([UNSPELL[c] for c in token]) for token in vocab if token not in special}
    for spelled, token in unspell.items():
        tokens[vocab[spelled]] = token
    listed = {}
    for n, merge in enumerate(merges):
        pair = merge.split(' ') if isinstance(merge, str) else merge
        if len(pair) != 2 or not {*pair, ''.join(pair)} <= vocab.keys():
            raise UserError(f'merge {n}, {merge!r}, is not of two tokens that the vocabulary has, and their sum')
        if not {*pair, ''.join(pair)} & special.keys():  # special tokens are cut out before
            listed[unspell[pair[0]], unspell[pair[1]]] = n
    rank = {token: n for n, token in enumerate(sorted(t for t in tokens if len(t) == 1))}
    for a, b in listed:
        rank.setdefault(a + b, len(rank))
    made = len(rank)
    for token in filter(None, tokens):
        rank.setdefault(token, len(rank))
    blocks = [rank[a + b] for a, b in listed]
    if not (ignore_merges and blocks == sorted(blocks) and all(
            (t[:i], t[i:]) in listed for t in rank for i in range(1, len(t)) if t[:i] in rank and t[i:] in rank)):
        last, whole = -1, []
        for a, b in listed:
            if max(rank[a], rank[b]) >= rank[a + b]:
                raise UserError(f'tiktoken cannot make token {a + b!r} of {a!r} and {b!r}, which are merged later')
        for token in [t for t in rank if len(t) > 1]:
            pair = tuple(_parts(token, rank, rank[token]))
            if listed.get(pair, last) > last:
                last = listed[pair]
            elif pair in listed:
                raise UserError(f'tiktoken would make token {token!r} before its merge of {pair}')
            else:
                del rank[token]
                whole.append(token)  # no merges make it: at most, a word that is this token is looked up
        for token in whole if ignore_merges else []:
            if len(_parts(token, rank, made)) == 2:
                raise UserError(f'tiktoken would make token {token!r} within words, its merges do not')
        rank |= dict.fromkeys(whole if ignore_merges else [])
    if not rank:
        raise UserError('its vocabulary is empty')
    ends = [*dict.fromkeys(i for i in ends if type(i) is int and i in special.values())]
    if not ends and '<|endoftext|>' not in special:
        raise UserError("no special token ends a text: name an 'eos_token' in tokenizer_config.json")
    id_of = {token: i for i, token in enumerate(tokens)}
    system = re.search(DEFAULT_SYSTEM, template or '', re.S)
    return Tokenizer('hf', name, tokens, special, pattern, order=[id_of[token] for token in rank], nfc=nfc, bos=bos,
                     eot=(ends or [special.get('<|endoftext|>')])[0], stop_ids=ends,
                     chat=template is None or '<|im_start|>' in template and 'bos_token' not in template,
                     system=system and re.sub(r'\\(.)', lambda m: '\n' if m[1] == 'n' else m[1], system[1]))


def _hf_pattern(cut):
    """The pre-tokenizer of a tokenizer.json -> the pattern that cuts text in the same places."""
    steps = cut['pretokenizers'] if (cut or {}).get('type') == 'Sequence' else [cut or {}]
    kinds, last = [step.get('type') for step in steps], steps[-1]
    if last.get('type') == 'ByteLevel' and not last.get('add_prefix_space', True):
        if kinds == ['ByteLevel'] and last.get('use_regex', True):
            return GPT2_PATTERN
        if kinds == ['Digits', 'ByteLevel'] and steps[0].get('individual_digits') and last.get('use_regex', True):
            return SMOLLM_PATTERN
        if kinds == ['Split', 'ByteLevel'] and not last.get('use_regex', True) and 'Regex' in steps[0]['pattern']:
            pattern, how = steps[0]['pattern']['Regex'], (steps[0]['behavior'], steps[0].get('invert', False))
            if pattern in (GPT4_PATTERN, QWEN2_PATTERN) and how == ('Isolated', False):
                return pattern
            if found := DIALECT.search(pattern):
                raise UserError(f"its pre-tokenizer's '{found.group()}' may mean something else to tiktoken: {pattern}")
            if how == ('Removed', True):
                return pattern
            if how == ('Isolated', False):  # what the pattern does not match is kept
                return rf'{pattern}|(?:(?!{pattern})[\s\S])+'
    raise UserError(f"pre-tokenizer {json.dumps(cut)[:200]} is not supported: only ByteLevel without a prefix space, "
                    'alone or after Split (Regex, Isolated) or Digits (individual)')


def hf_tokenizer(directory):
    """Byte-level BPE of Hugging Face (GPT-2, Llama 3, Qwen 2 and 3, SmolLM2 …): the folder that has the tokenizer.json.

    `encode(text, allow_special=True)` gives the ids of transformers with add_special_tokens=False.
    """
    def read(name):
        path = os.path.join(directory, name)
        if not os.path.exists(path):
            return {}
        if name.endswith('.json'):
            return _read_json(path)
        with open(path, encoding='utf-8') as f:
            return f.read()

    path = os.path.join(directory, 'tokenizer.json')
    d, config, generation = _read_json(path), read('tokenizer_config.json'), read('generation_config.json')
    generation, jinja = generation or read('config.json'), read('chat_template.jinja')
    try:
        template, ends = jinja or config.get('chat_template'), generation.get('eos_token_id')
        if isinstance(template, list):
            template = {t['name']: t['template'] for t in template}.get('default')
        return _from_hf(os.path.basename(os.path.abspath(directory)), d, config, ends, template)
    except UserError as error:
        raise UserError(f'{path}: {error}') from None
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise UserError(f'{path}: not a tokenizer.json of Hugging Face: {type(error).__name__} {error}') from None


def _from_hf(name, d, config, ends, template):
    """What is in tokenizer.json and tokenizer_config.json, the ids that end a text, the chat template -> Tokenizer."""
    def need(condition, what):
        if not condition:
            raise UserError(f'{what} is not supported: only byte-level BPE is')

    model, norm, special, normalized = d['model'], d.get('normalizer'), {}, set()
    vocab = model['vocab']
    need(model.get('type', 'BPE') == 'BPE', f"model type {model.get('type')}")
    for key in ('dropout', 'continuing_subword_prefix', 'end_of_word_suffix'):
        need(not model.get(key), f"the model's {key}")
    need(all(c in vocab for c in UNSPELL) or not (model.get('unk_token') or model.get('byte_fallback')),
         'a vocabulary without all bytes that has an unk_token or byte_fallback')
    need(norm is None or norm['type'] == 'NFC', f"normalizer {(norm or {}).get('type')}")
    need(not config.get('add_prefix_space'), 'add_prefix_space in tokenizer_config.json')
    added = {t['content']: t for t in d.get('added_tokens') or []}
    for i, t in (config.get('added_tokens_decoder') or {}).items():
        added.setdefault(t['content'], t | {'id': int(i)})
    for text, t in added.items():
        flags = [k for k in ('lstrip', 'rstrip', 'single_word', 'normalized') if t.get(k) and (norm or k[0] != 'n')]
        need(not flags and len(text) > 1, f"added token {text!r} with {', '.join(flags) or 'one character'}")
        theirs = vocab.get(text, max([len(vocab) - 1, *special.values()]) + 1)  # whatever the file says
        if t['id'] != theirs:
            raise UserError(f"added token {text!r} has the id {t['id']}, transformers makes that {theirs}: set it so")
        special[text] = t['id']
        normalized |= {text} if t.get('normalized') else set()
    for a in normalized:  # these are looked for where the others have left text
        for b in special.keys() - normalized:
            need(not any(a[:k] == b[-k:] or b[:k] == a[-k:] for k in range(1, len(a))) and a not in b and b not in a,
                 f'{a!r}, which is normalized and overlaps with {b!r}, which is not,')

    def named(key):
        value = config.get(key)
        return special.get(value.get('content') if isinstance(value, dict) else value)

    ends = ends if isinstance(ends, list) else [ends]
    post, bos = d.get('post_processor') or {}, named('bos_token') if config.get('add_bos_token') else None
    for step in post.get('processors', [post]):
        if step.get('type') == 'TemplateProcessing' and 'SpecialToken' in step['single'][0]:
            bos = special[step['single'][0]['SpecialToken']['id']]
    return bpe_tokenizer(name, vocab, model['merges'], special, _hf_pattern(d.get('pre_tokenizer')), norm is not None,
                         bool(model.get('ignore_merges')), [named('eos_token'), *ends], template, bos)


def gguf_tokenizer(fields):
    """The tokenizer of a GGUF file, whose metadata is the dict `fields`: 'tokenizer.ggml.tokens' and its like."""
    get = {key.removeprefix('tokenizer.ggml.'): value for key, value in fields.items()}.get
    if get('model') != 'gpt2' or get('pre') not in GGUF_PRE or get('tokens') is None or get('merges') is None:
        raise UserError(f"GGUF tokenizer '{get('model')}' with pre-tokenizer '{get('pre')}' is not supported: only "
                        f"byte-level BPE (gpt2) with its merges and {', '.join(GGUF_PRE)}")
    pattern, nfc, whole = GGUF_PRE[get('pre')]
    spelled, types = list(get('tokens')), list(map(int, get('token_type', [])))
    types += [1] * (len(spelled) - len(types))  # 3: control, 4: the user's, 5: unused
    vocab = {token: i for i, (token, kind) in enumerate(zip(spelled, types, strict=True)) if kind != 5}
    if len(vocab) != len(spelled) - types.count(5):
        raise UserError("'tokenizer.ggml.tokens' has a token twice")
    special = {token: i for token, i in vocab.items() if types[i] in (3, 4)}
    return bpe_tokenizer(
        fields.get('general.name', 'gguf'), vocab, get('merges'), special, pattern, nfc, whole,
        [get(f'{key}_token_id') for key in ('eos', 'eot', 'eom')], fields.get('tokenizer.chat_template'),
        get('bos_token_id') if get('add_bos_token', whole) else None)
