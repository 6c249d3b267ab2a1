import json
import random
import re
from collections import Counter
from pydoc_data.topics import topics

import numpy as np
import pytest
import regex
import requests
import tiktoken
import torch

import tokenizer as tok
from tokenizer import SPECIALS, Tokenizer, UserError

UNICODE = ("naïve Straße, it'S 1234567 ½ ٣٤٥\r\n\r\n 東京\u3000は  \t\n \n  x!?\n\ny Ελλάδα I'LL we'ſ\u2028\x85 \x1c "
           '🙂\U0001f469\u200d\U0001f467 e\u0301 \n')


def random_text(seed, alphabet, length):
    return ''.join(random.Random(seed).choices(alphabet, k=length))


def naive_bpe(words, n_tokens):
    """The textbook algorithm: count every pair anew, merge the best one in every word, again."""
    tokens = [bytes([b]) for b in tok.BYTE_ORDER]
    merges, words = [], {tuple(tokens.index(bytes([b])) for b in w.encode()): n for w, n in words.items()}
    while len(tokens) < n_tokens:
        counts = Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:], strict=False):
                counts[pair] += n
        if not counts:
            break
        pair = min(counts, key=lambda p: (-counts[p], p))
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        merges.append(pair)
        merged = {}
        for word, n in words.items():
            new, i = [], 0
            while i < len(word):
                hit = word[i:i + 2] == pair
                new.append(len(tokens) - 1 if hit else word[i])
                i += 2 if hit else 1
            merged[tuple(new)] = merged.get(tuple(new), 0) + n
        words = merged
    return tokens, merges


@pytest.fixture(scope='module')
def english():
    return '\n'.join(topics[key] for key in sorted(topics))[:400_000]


@pytest.fixture(scope='module')
def tokenizers(english):
    return {'bytes': tok.bytes_tokenizer(), 'chars': tok.chars_tokenizer([english, UNICODE]),
            'bpe': tok.train_bpe([english[:50_000], UNICODE], 600)}


def test_bpe_merges_equal_a_naive_reference():
    texts = ['aaaa aaaaa aa aaaaaaa', 'abab ababab ba bab', 'the cat sat on the mat, the rat', 'é éé ééé ¡é', 'ab']
    texts += [random_text(seed, 'aab ', 10 + seed) for seed in range(60)]
    texts += [random_text(seed, 'abcdefg ', 300) for seed in range(5)]
    texts += [' '.join('a' * random.Random(seed + n).randrange(1, 60) for n in range(20)) for seed in range(0, 400, 20)]
    for text in texts:
        words = Counter(regex.findall(tok.GPT4_PATTERN, text))
        tokens, merges = tok.learn_merges(words, 256 + 40)
        assert (tokens, merges) == naive_bpe(words, 256 + 40), text
        assert len(set(tokens)) == len(tokens) == 256 + len(merges)


def test_bpe_vocabulary_and_merges_equal_hugging_face(english):
    hf = pytest.importorskip('tokenizers')
    text = english + UNICODE * 50
    theirs = hf.Tokenizer(hf.models.BPE())
    pre = hf.pre_tokenizers
    theirs.pre_tokenizer = pre.Sequence([pre.Split(hf.Regex(tok.GPT4_PATTERN), 'isolated'),
                                         pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    theirs.train_from_iterator([text], hf.trainers.BpeTrainer(
        vocab_size=3000, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False))
    model = json.loads(theirs.to_str())['model']
    tokens, merges = tok.learn_merges(tok._count_words([text], tok.GPT4_PATTERN), 3000)
    spelled = [''.join(tok.SPELLING[b] for b in token) for token in tokens]
    assert spelled == sorted(model['vocab'], key=model['vocab'].get)
    assert [[spelled[a], spelled[b]] for a, b in merges] == model['merges']


def test_bpe_words_are_those_of_the_published_pattern():
    endings = "'s 'S 't 'T 'd 'D 'm 'M 'll 'LL 'lL 'Ll 've 'VE 're 'Re 'l 'v x '".split()
    ascii_text = random_text(1, [*endings, *"aB'1234,;!\n\n\r\t\x0b\x1c   _"], 150_000)
    mixed = random_text(2, "aZ'sſK 1²٣,\n\r\t\x0b\x1c\x85\xa0\u2028\u3000   éßΩ東e\u0301🙂", 200_000)
    for text in (ascii_text, mixed, ' \n' * 70_000 + ' x', '', UNICODE):
        assert tok._count_words([text], tok.GPT4_PATTERN) == Counter(regex.findall(tok.GPT4_PATTERN, text))
    assert tok._count_words(['don', "'t"], tok.GPT4_PATTERN) == {'don': 1, "'t": 1}  # a document's end is a word's end
    # Trained until nothing is left to merge, each word is one token: so tiktoken's own splitting shows in the ids.
    text = mixed[:3000] + ascii_text[:3000]
    tokenizer = tok.train_bpe([text], 10**6)
    assert [tokenizer.decode([i]) for i in tokenizer.encode(text)] == regex.findall(tok.GPT4_PATTERN, text)
    assert tokenizer.n_vocab < 10**5 and tokenizer.name == f'bpe-{tokenizer.n_vocab}'  # small text, small vocabulary


def test_every_byte_string_comes_back_exactly(tokenizers):
    rng = random.Random(0)
    strings = [rng.randbytes(n) for n in range(200)] + [bytes(range(256)), b'\xed\xa0\x80', UNICODE.encode()[:-9]]
    for kind in ('bytes', 'bpe'):
        tokenizer = tokenizers[kind]
        for data in strings:
            assert tokenizer.decode_bytes(tokenizer.encode(data)) == data
        assert tokenizer.decode(tokenizer.encode(UNICODE)) == UNICODE
        assert tokenizer.encode(UNICODE) == tokenizer.encode(UNICODE.encode())
        assert tokenizer.decode(tokenizer.encode('a\ud800b')) == 'a\ufffdb'
    blanks = ' ' * 1_000_001 + 'x'  # the pattern on its own would overflow tiktoken's stack
    assert tokenizers['bpe'].decode(tokenizers['bpe'].encode(blanks)) == blanks
    assert len(tokenizers['bpe'].encode(UNICODE)) < len(UNICODE.encode()) == len(tokenizers['bytes'].encode(UNICODE))


def test_chars_are_sorted_and_unseen_ones_unknown():
    tokenizer = tok.chars_tokenizer(iter(['hello\n', 'world é']))
    assert [tokenizer.decode([i]) for i in range(10)] == sorted(set('hello\nworld é'))
    assert tokenizer.n_vocab == 10 + 1 + len(SPECIALS) and tokenizer.special['<unk>'] == 10
    assert tokenizer.encode('hexe') == [*tokenizer.encode('he'), 10, *tokenizer.encode('e')]
    assert tokenizer.decode(tokenizer.encode('hé\nx')) == 'hé\n<unk>'


def test_special_tokens_only_on_request(tokenizers):
    for tokenizer in tokenizers.values():
        assert tokenizer.eot == tokenizer.special['<|endoftext|>']
        assert all(0 <= tokenizer.special[s] < tokenizer.n_vocab for s in SPECIALS)
        start = tokenizer.special['<|im_start|>']
        text = 'say<|im_start|><|endoftext|>it <|im_end|'
        assert not set(tokenizer.encode(text)) & {tokenizer.special[s] for s in SPECIALS}
        assert tokenizer.encode(text, allow_special=True) == [
            *tokenizer.encode('say'), start, tokenizer.eot, *tokenizer.encode('it <|im_end|')]
        assert tokenizer.encode('<|pad|>', allow_special=True) == [tokenizer.special['<|pad|>']]
        assert '<|pad|>' in tokenizer.decode(tokenizer.encode('x<|pad|>', allow_special=True))


def test_the_longest_special_token_wins(tokenizers):
    d = tokenizers['bytes'].to_dict()
    tokenizer = Tokenizer.from_dict(d | {'tokens': d['tokens'] + [''], 'special': d['special'] | {'<|pad|>!': 260}})
    assert tokenizer.encode('<|pad|>!<|pad|>', allow_special=True) == [260, tokenizer.special['<|pad|>']]


def test_batch_and_token_bytes(tokenizers, english):
    texts = [english[i:i + 500] for i in range(0, 20_000, 500)] + ['', UNICODE]
    for tokenizer in tokenizers.values():
        assert tokenizer.encode_batch([b'a\xff', *texts[:2]])[1:] == [tokenizer.encode(t) for t in texts[:2]]
        ids = tokenizer.encode_batch(iter(texts))
        assert ids == [tokenizer.encode(t) for t in texts]
        sizes = tokenizer.token_bytes()
        assert sizes.dtype == np.int32 and sizes.shape == (tokenizer.n_vocab,)
        assert [sizes[i].sum() for i in ids] == [len(t.encode()) for t in texts]
        assert not sizes[list(tokenizer.special.values())].any()


def test_streaming_never_emits_half_a_character(tokenizers):
    rng = random.Random(0)
    for tokenizer in tokenizers.values():
        stream, texts = tokenizer.stream(), []
        for i in tokenizer.encode(UNICODE):
            texts.append(stream.push(i))
        assert ''.join(texts) == UNICODE and stream.flush() == ''  # so no text has a U+FFFD
        for n in range(300):
            stream, ids = tokenizer.stream(), rng.choices(range(tokenizer.n_vocab), k=n % 30)
            if n % 2:
                ids = tokenizer.encode(rng.randbytes(n % 30) + '🙂'.encode()[:n % 4])
            assert ''.join([stream.push(i) for i in ids]) + stream.flush() == tokenizer.decode(ids)


def test_tokenizers_survive_saving(tokenizers, tmp_path):
    for kind, tokenizer in tokenizers.items():
        tokenizer.save(tmp_path / 'tokenizer.json')
        torch.save(tokenizer.to_dict(), tmp_path / 'ckpt.pt')
        again = [Tokenizer.load(tmp_path / 'tokenizer.json'),
                 Tokenizer.from_dict(torch.load(tmp_path / 'ckpt.pt', weights_only=True))]
        for t in again:
            assert vars(t).keys() == vars(tokenizer).keys() and t.to_dict() == tokenizer.to_dict()
            assert t.encode(UNICODE + '<|pad|>', True) == tokenizer.encode(UNICODE + '<|pad|>', True)
        lines = (tmp_path / 'tokenizer.json').read_text(encoding='utf-8').splitlines()
        assert len(lines) > tokenizer.n_vocab and (kind != 'bpe' or '"Ġthe",' in lines)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['ckpt.pt', 'tokenizer.json']


def test_tiktoken_encodings_by_name(monkeypatch, tmp_path):
    ranks = {bytes([b]): b for b in range(256)} | {b'he': 256, b'll': 258, b'hell': 259}
    small = tiktoken.Encoding('gpt2', pat_str=r'\S+|\s+', mergeable_ranks=ranks, special_tokens={'<|endoftext|>': 257})
    monkeypatch.setattr(tiktoken, 'get_encoding', lambda name: small)
    tokenizer = tok.get_tokenizer('gpt2')
    assert tokenizer.eot == 257 and tokenizer.special['<|im_start|>'] == 260 and tokenizer.n_vocab == 263
    assert tokenizer.encode('hello<|endoftext|>', True) == [259, ord('o'), 257]
    tokenizer.save(tmp_path / 't.json')
    monkeypatch.undo()  # the saved file needs tiktoken's file no more
    assert Tokenizer.load(tmp_path / 't.json').encode('hello he') == [259, ord('o'), 32, 256]


def test_unavailable_tiktoken_encoding_says_what_to_fetch(monkeypatch, tmp_path):
    def offline(url, *args, **kwargs):
        raise requests.ConnectionError(request=requests.Request('GET', url).prepare())
    monkeypatch.setattr(requests, 'get', offline)
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path))
    with pytest.raises(UserError, match='download https://.*tiktoken, call the file [0-9a-f]{40} .*TIKTOKEN_CACHE_DIR'):
        tok.get_tokenizer('p50k_edit')


@pytest.mark.parametrize('call, message', [
    (lambda: tok.get_tokenizer('gtp2'), "'gtp2': did you mean 'gpt2'"),
    (lambda: tok.get_tokenizer('byte'), "did you mean 'bytes'"),
    (lambda: tok.get_tokenizer('bpe', 'text'), 'needs a vocab_size'),
    (lambda: tok.get_tokenizer('bpe', vocab_size=300), 'given none'),
    (lambda: tok.get_tokenizer('bpe', ['text'], 259), 'vocab_size=259 is too small .* 260'),
    (lambda: tok.get_tokenizer('bpe', ['', ''], 300), 'no text'),
    (lambda: tok.get_tokenizer('chars', []), 'no text'),
    (lambda: tok.bytes_tokenizer().decode([65, 260]), '260 is outside the 260 ids'),
    (lambda: tok.bytes_tokenizer().stream().push(-1), '-1 is outside'),
])
def test_tokenizer_mistakes_are_one_line(call, message):
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('change, message', [
    (lambda d: [], "'kind' must be one of"),
    (lambda d: {'model': {}}, "'kind' must be one of"),
    (lambda d: d | {'kind': ['bpe']}, "'kind' must be one of"),
    (lambda d: d | {'name': 3}, "'name'"),
    (lambda d: d | {'tokens': {}}, "'tokens' must be a list"),
    (lambda d: d | {'tokens': d['tokens'] + [1]}, "'tokens' must be a list"),
    (lambda d: d | {'special': []}, "'special' must map"),
    (lambda d: d | {'special': {'<|endoftext|>': 261}}, 'lacks <|im_start|>'),
    (lambda d: d | {'special': d['special'] | {'x': 0}}, "special token 'x' must be"),
    (lambda d: d | {'special': d['special'] | {'x': 10**9}}, "special token 'x' must be"),
    (lambda d: d | {'special': d['special'] | {'x': '7'}}, "special token 'x' must be"),
    (lambda d: d | {'special': d['special'] | {'x': d['special']['<|pad|>']}}, 'share an id'),
    (lambda d: d | {'tokens': d['tokens'][:256] + ['ab', 'ab'] + d['tokens'][256:]}, 'special token'),
    (lambda d: d | {'tokens': d['tokens'] + ['ab', 'ab']}, 'token 262 is the same as token 261'),
    (lambda d: d | {'tokens': d['tokens'] + ['a b']}, "token 261 is misspelled: 'a b'"),
    (lambda d: d | {'tokens': [''] + d['tokens'][1:]}, 'each of the 256 single bytes'),
    (lambda d: d | {'pattern': None}, "'pattern' must be a string"),
    (lambda d: d | {'pattern': '('}, "'pattern' is no regular expression"),
    (lambda d: d | {'pattern': 'a*'}, "'pattern' must not match an empty text"),
    (lambda d: d | {'kind': 'bytes'}, '256 bytes in order'),
    (lambda d: d | {'kind': 'chars'}, "'special' lacks <unk>"),
    (lambda d: d | {'kind': 'chars', 'special': d['special'] | {'<unk>': 261}, 'tokens': d['tokens'] + ['']},
     "token 256 is misspelled: 'el'"),
])
def test_a_wrong_tokenizer_file_is_named(change, message, tmp_path):
    good = tok.train_bpe('hello hello', 261).to_dict()
    assert Tokenizer.from_dict(good).n_vocab == 261
    (tmp_path / 't.json').write_text(json.dumps(change(good)), encoding='utf-8')
    with pytest.raises(UserError, match=f'^{re.escape(str(tmp_path / "t.json"))}: .*{re.escape(message)}') as caught:
        Tokenizer.load(tmp_path / 't.json')
    assert '\n' not in str(caught.value)


def test_unreadable_tokenizer_files_are_named(tmp_path):
    path = tmp_path / 't.json'
    for content in (b'', b'{"kind": "bytes"', b'\xff\xfe\x00', b'[' * 100_000):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f'{path}: not JSON'):
            Tokenizer.load(path)
    with pytest.raises(UserError, match='cannot read .*absent.json: No such file'):
        Tokenizer.load(tmp_path / 'absent.json')
    with pytest.raises(UserError, match='cannot write .*t.json/x: Not a directory'):
        tok.bytes_tokenizer().save(path / 'x')
