"""LoRA, QLoRA, adapters and packed rows; the truth comes from peft, float64 arithmetic by hand, dense layers."""
import json
import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

import convert
import model as model_file
import runtime
from model import GPT, GPTConfig, LoRALinear
from test_all import ids, tiny
from tokenizer import UserError, bytes_tokenizer

LLAMA = dict(pos='rope', mlp='swiglu', norm='rmsnorm', bias=False, n_kv_head=2)
SMOLLM2 = dict(block_size=2048, vocab_size=49152, n_layer=30, n_head=9, n_kv_head=3, n_embd=576, mlp_dim=1536,
               mlp='swiglu', norm='rmsnorm', pos='rope', bias=False)


def learned(model, std=0.2):
    """The model with random small tensors, as if it had been trained."""
    torch.manual_seed(3)
    with torch.no_grad():
        for tensor in model.small_state().values():
            tensor.normal_(0, std)
    return model


def state_of(model):
    return {'model': model.state_dict(), 'model_args': vars(model.config), 'iter': 7,
            'tokenizer': bytes_tokenizer().to_dict()}


# ----------------------------------------------------------------------------------------------------------------------
# LoRA and adapters

def test_new_fields_change_no_initial_weight():
    torch.manual_seed(0)
    plain = GPT(GPTConfig(block_size=8, vocab_size=32, n_layer=2, n_head=2, n_embd=16)).state_dict()
    torch.manual_seed(0)
    more = GPT(GPTConfig(block_size=8, vocab_size=32, n_layer=2, n_head=2, n_embd=16, lora_rank=2, adapter_dim=3))
    assert all(torch.equal(more.state_dict()[name], tensor) for name, tensor in plain.items())
    a = more.blocks[0].attn.qkv.lora_a
    assert a.shape == (3, 2, 16) and 0.2 < a.abs().max() <= 0.25  # U(-1/sqrt(16), 1/sqrt(16)), as in PEFT
    assert not more.blocks[0].attn.qkv.lora_b.any() and not more.blocks[0].adapter1.up.any()


@pytest.mark.parametrize('rs', [False, True])
def test_lora_is_the_papers_formula_for_each_of_q_k_and_v(rs):
    config = GPTConfig(n_embd=8, n_head=2, lora_rank=3, lora_alpha=6.0, lora_targets='q,v', lora_rs=rs)
    layer = model_file.linear(config, 8, True, q=8, k=4, v=4)
    torch.manual_seed(0)
    torch.nn.init.normal_(layer.lora_a)
    torch.nn.init.normal_(layer.lora_b)
    x = torch.randn(5, 8)
    w, b, a_q, a_v = (t.double() for t in (layer.weight, layer.bias, *layer.lora_a))
    b_q, b_v = layer.lora_b.double().split((8, 4))
    scale = 6 / math.sqrt(3) if rs else 2
    y = x.double() @ w.T + b
    y[:, :8] += scale * (x.double() @ a_q.T @ b_q.T)
    y[:, 12:] += scale * (x.double() @ a_v.T @ b_v.T)
    torch.testing.assert_close(layer(x).double(), y, atol=1e-6, rtol=1e-6)


def test_adapters_are_a_bottleneck_with_a_residual_behind_each_sublayer():
    model = learned(tiny(adapter_dim=5, n_layer=1))
    x = model.embed(ids(2, 9))
    block = model.blocks[0]

    def adapter(p, h):
        inner = F.gelu(h @ p.down.T + p.down_bias)
        return h + inner @ p.up.T + p.up_bias
    h = x + adapter(block.adapter1, block.attn(block.norm1(x)))
    h = h + adapter(block.adapter2, block.mlp(block.norm2(h)))
    torch.testing.assert_close(block(x), h)


OPTIONS = [dict(lora_rank=4), dict(lora_rank=2, lora_targets='q,v', **LLAMA), dict(lora_rank=3, adapter_dim=4),
           dict(lora_rank=3, quant='nf4', **LLAMA), dict(adapter_dim=4, quant='nf4', norm_place='post'),
           dict(lora_rank=2, quant='nf4', tie_weights=False, lora_rs=True, pos='rope', n_expert=4, expert_dim=24),
           dict(lora_rank=2, quant='nf4', n_encoder_layer=1, n_kv_head=2)]


@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_the_merged_model_computes_the_same(options):
    model = learned(tiny(**options, init_std=0.1), 0.1)
    merged = model.merged()
    source = {'source': ids(2, 6)} if 'n_encoder_layer' in options else {}
    x = ids(2, 20)
    torch.testing.assert_close(merged(x, **source), model(x, **source), atol=1e-5, rtol=1e-5)
    assert merged.config.lora_rank == 0 and merged.config.quant == ''
    assert not any(isinstance(m, LoRALinear) for m in merged.modules())
    assert merged.config.adapter_dim == options.get('adapter_dim', 0)
    before = model(x, **source).detach()
    with torch.no_grad():
        for p in merged.parameters():
            p.zero_()  # a model of its own
    assert torch.equal(model(x, **source), before)
    assert {p.dtype for p in model.merged(torch.bfloat16).parameters()} == {torch.bfloat16}


def test_merging_holds_one_matrix_more_than_its_result():
    model = learned(GPT(GPTConfig(block_size=8, vocab_size=8, n_layer=6, n_head=2, n_embd=256, lora_rank=2)))
    alive, peak = {}, 0

    class Counter(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal peak
            out = func(*args, **kwargs or {})
            if isinstance(out, torch.Tensor) and out.device.type == 'cpu':
                storage = out.untyped_storage()
                if storage.data_ptr() not in own:
                    alive[storage.data_ptr()] = (torch.multiprocessing.reductions.StorageWeakRef(storage),
                                                 storage.nbytes())
                peak = max(peak, sum(n for ref, n in alive.values() if not ref.expired()))
            return out
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    with Counter():
        merged = model.merged()
    largest = 4 * max(p.numel() for p in merged.parameters())
    assert peak <= merged.memory() + 1.1 * largest


@pytest.mark.parametrize('options', [*OPTIONS[:6], dict(lora_rank=2, n_expert=4, **LLAMA)], ids=str)
@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_the_frozen_base_never_changes_and_the_rest_learns(options, optimizer):
    model = tiny(**options).freeze().train()
    frozen = {n: t.clone() for n, t in (*model.named_parameters(), *model.named_buffers())
              if n not in model.small_state()}
    small = {n: t.clone() for n, t in model.small_state().items()}
    optimizers = model.configure_optimizers(optimizer, learning_rate=0.01)
    assert {id(p) for g in optimizers.param_groups for p in g['params']} == {
        id(p) for n, p in model.named_parameters() if n in small}
    assert len(optimizers) == 1  # no Muon
    assert all(g['weight_decay'] > 0 for g in optimizers.param_groups for p in g['params'] if p.ndim > 1)
    x, losses = ids(4, 20), []
    for _ in range(40):
        loss = model(x[:, :-1], x[:, 1:])
        loss.backward()
        optimizers.step()
        optimizers.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    now = dict((*model.named_parameters(), *model.named_buffers()))
    assert all(torch.equal(now[n], t) for n, t in frozen.items())
    assert all(not torch.equal(now[n], t) for n, t in small.items())
    assert model.num_params(learning=True) == sum(t.numel() for t in small.values())


def test_lora_dropout_is_off_in_evaluation():
    model = learned(tiny(lora_rank=2, lora_dropout=0.5))
    x = ids(1, 12)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    torch.testing.assert_close(model.eval()(x), learned(tiny(lora_rank=2))(x))


def test_small_states_come_back_onto_their_base():
    base = tiny(**LLAMA)
    model = learned(GPT.from_state(state_of(base), lora_rank=3, adapter_dim=4)).eval()
    small = {n: t.clone() for n, t in model.small_state().items()}
    assert set(small) == {n for n, p in model.freeze().named_parameters() if p.requires_grad}
    again = GPT.from_state({'model': base.state_dict() | small, 'model_args': vars(model.config)}).eval()
    assert torch.equal(again(ids(2, 9)), model(ids(2, 9)))
    with pytest.raises(ValueError, match='tensor blocks.0.adapter1.down is missing'):
        GPT.from_state({'model': base.state_dict() | {n: t for n, t in small.items() if 'adapter' not in n},
                        'model_args': vars(model.config)})
    with pytest.raises(ValueError, match='tensor blocks.0.attn.qkv.lora_a is not part of this model'):
        GPT.from_state({'model': base.state_dict() | small, 'model_args': vars(base.config)})
    with pytest.raises(ValueError, match=r'lora_a has shape \(3, 3, 32\) where this model has \(3, 5, 32\)'):
        GPT.from_state({'model': base.state_dict() | small, 'model_args': vars(model.config)}, lora_rank=5)
    short = {k: v for k, v in base.state_dict().items() if k != 'blocks.1.mlp.up.weight'}
    with pytest.raises(ValueError, match='tensor blocks.1.mlp.up.weight is missing'):
        GPT.from_state({'model': short, 'model_args': vars(base.config)}, lora_rank=2, quant='nf4')


def test_frozen_matrices_cost_four_operations_each():
    T, full = 24, GPT(GPTConfig(block_size=24, vocab_size=61, n_layer=2, n_head=4, n_embd=32))
    model = GPT(GPTConfig(block_size=24, vocab_size=61, n_layer=2, n_head=4, n_embd=32, lora_rank=2)).freeze()
    small = model.num_params(learning=True)
    frozen = 2 * 12 * 32 * 32 + 61 * 32
    assert full.flops_per_token(0) == 6 * frozen and model.flops_per_token(0) == 4 * frozen + 6 * small
    assert model.flops_per_token(T) - model.flops_per_token(0) == full.flops_per_token(T) - full.flops_per_token(0)
    packed = GPT(GPTConfig(block_size=24, vocab_size=61, n_layer=2, n_head=4, n_embd=32, lora_rank=2, quant='nf4'))
    assert packed.freeze().flops_per_token(T) == model.flops_per_token(T)
    assert packed.num_params() == model.num_params() == full.num_params() + small


def test_a_frozen_head_costs_no_gradient_of_its_own(monkeypatch):
    monkeypatch.setattr(model_file, 'chunk_rows', lambda vocab, device: 16)
    model = learned(tiny(lora_rank=2)).freeze()
    x, y = ids(2, 20), ids(2, 20, seed=1)
    for reduction in ('mean', 'none'):
        model(x, y, reduction=reduction).mean().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        for n, g in grads.items():
            torch.testing.assert_close(g, model.get_parameter(n).grad, atol=1e-5, rtol=1e-4)
        assert set(grads) == set(model.small_state())
        model.zero_grad()


@pytest.mark.parametrize('changes, words', [
    (dict(lora_rank=2, lora_targets='q,w'), "lora_targets='q,w': 'w' is not one of q, k"),
    (dict(lora_rank=2, lora_targets='gate'), "lora_targets='gate': this model has none of them"),
    (dict(lora_rank=2, lora_targets='up,down', n_expert=4), 'this model has none of them'),
    (dict(lora_rank=2, lora_targets=''), "lora_targets='': this model has none of them"),
    (dict(lora_rank=-1), 'lora_rank=-1 must not be negative'), (dict(adapter_dim=-1), 'adapter_dim=-1 must not be'),
    (dict(lora_alpha=-1.0), 'lora_alpha=-1.0 must not be negative'),
    (dict(lora_dropout=1.0), r'lora_dropout=1.0 must be in \[0, 1\)'),
    (dict(quant='int3'), "quant='int3' is not one of '', 'nf4'"), (dict(quant='nf4'), 'nothing could be trained')])
def test_impossible_values_of_lora_are_one_sentence(changes, words):
    with pytest.raises(ValueError, match=words):
        GPTConfig(**changes)
    GPTConfig(lora_rank=2, lora_targets='q, gate')  # there is no gate, but a q


@pytest.mark.parametrize('options', [dict(lora_rank=2), dict(adapter_dim=2, quant='nf4')], ids=str)
def test_lora_is_folded_in_before_packing(options):
    with pytest.raises(ValueError, match='fold it in first'):
        tiny(**options).pack()
    model = learned(tiny(**options))
    torch.testing.assert_close(model.merged().pack()(ids(1, 9)), model(ids(1, 9)), atol=1e-4, rtol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# 4 bits

LEVELS = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
          -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
          0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]


def test_nf4_takes_the_nearest_of_the_papers_levels():
    torch.manual_seed(0)
    w = torch.randn(5, 37)  # 185 numbers: two blocks of 64 and one of 57
    codes, scales = model_file.nf4_quantize(w)
    assert codes.shape == (96,) and codes.dtype == torch.uint8
    got = model_file.nf4_dequantize(codes, scales, w.shape, torch.float32)
    flat = w.flatten().tolist()
    for start in range(0, 185, 64):
        block = flat[start:start + 64]
        largest = max(map(abs, block))
        expected = [largest * min(LEVELS, key=lambda level: abs(x / largest - level)) for x in block]
        torch.testing.assert_close(got.flatten()[start:start + 64], torch.tensor(expected))
    high, low = int(codes[0]) >> 4, int(codes[0]) & 15
    torch.testing.assert_close(got.flatten()[:2], torch.tensor([LEVELS[high], LEVELS[low]]) * scales[0])
    for dtype in (torch.bfloat16, torch.float16):
        half = model_file.nf4_dequantize(codes, scales, w.shape, dtype)
        torch.testing.assert_close(half.float(), got, atol=0, rtol=0.012)


def test_levels_are_the_quantiles_of_appendix_e():
    """Even steps of the normal distribution's quantile function, 7 below zero and 8 above, 1 at the ends."""
    normal = torch.distributions.Normal(0, 1)
    offset = (1 - 1 / 32 + 1 - 1 / 30) / 2
    above = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    below = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat((below, above.flip(0), torch.zeros(1, dtype=torch.float64))).sort().values / above.max()
    torch.testing.assert_close(levels, torch.tensor(LEVELS, dtype=torch.float64), atol=2e-6, rtol=0)
    assert model_file.NF4 == tuple(LEVELS)


def test_scales_in_8_bits_lie_near_themselves():
    torch.manual_seed(0)
    scales = 0.05 + 0.02 * torch.rand(1000)
    packed, steps, mean = model_file.pack_scales(scales)
    assert packed.dtype == torch.uint8 and packed.shape == (1024,) and steps.shape == (4,)
    off = (model_file.unpack_scales(packed, steps, mean)[:1000] - scales).abs()
    assert off.max() <= 0.01 / 16 + 1e-6  # half a step of a float with 3 bits, of what is left beside the mean
    same = torch.full((300,), 0.25)
    torch.testing.assert_close(model_file.unpack_scales(*model_file.pack_scales(same))[:300], same)


@pytest.mark.parametrize('autocast', [False, True])
def test_gradients_through_4_bits_are_those_of_a_dense_layer(autocast):
    torch.manual_seed(0)
    config = GPTConfig(n_embd=40, n_head=2, lora_rank=2, quant='nf4')
    layer = model_file.linear(config, 40, True, up=56)
    layer.quantize(torch.randn(56, 40))
    layer.lora_b.data.zero_()
    torch.nn.init.normal_(layer.lora_a)
    x, other = (torch.randn(3, 7, 40, generator=torch.Generator().manual_seed(1), requires_grad=True) for _ in 'ab')
    saved = []
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = layer(x)
        expected = F.linear(other, layer.frozen(), layer.bias)
    assert y.dtype == expected.dtype and not any(t.numel() == 56 * 40 for t in saved)
    g = torch.randn_like(y)
    y.backward(g)
    expected.backward(g)
    close = dict(atol=0.06, rtol=0.06) if autocast else dict(atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(y, expected, **close)
    torch.testing.assert_close(x.grad, other.grad, **close)


def test_smollm2_in_4_bits_takes_a_quarter_and_its_lora_a_few_megabytes():
    with torch.device('meta'):
        whole = GPT(GPTConfig(**SMOLLM2))
        model = GPT(GPTConfig(**SMOLLM2, lora_rank=8, quant='nf4')).freeze()
    assert whole.memory() == 4 * 134515008
    small = sum(t.nbytes for t in model.small_state().values())
    assert model.memory() - small < whole.memory() / 4 and model.memory() < whole.memory() / 4
    by_hand = 2 * 49152 * 576 + 4 * 61 * 576 + 30 * (960 + 576 + 3 * 1536) * 576 * (0.5 + 1 / 64 + 4 / (64 * 256))
    assert model.memory() - small == pytest.approx(by_hand, rel=1e-3)
    assert small == 4 * 30 * 8 * (3 * 576 + 960 + 576 * 2 + 3 * (576 + 1536)) and small < 10e6
    assert model.num_params() - whole.num_params() == small / 4


@pytest.mark.parametrize('autocast', [False, True])
def test_a_model_in_4_bits_learns_and_generates(autocast):
    model = GPT.from_state(state_of(tiny(**LLAMA)), lora_rank=8, quant='nf4').freeze().train()
    assert model.tok_emb.weight.dtype == torch.bfloat16 and model.embed(ids(1, 3)).dtype == torch.float32
    optimizers = model.configure_optimizers(learning_rate=0.02, weight_decay=0.0)
    x, losses = ids(2, 20), []
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        for _ in range(80):
            loss = model(x[:, :-1], x[:, 1:])
            loss.backward()
            optimizers.step()
            optimizers.zero_grad()
            losses.append(loss.item())
        text = model.generate([x[0, :4].tolist()], 12, temperature=0)
    assert losses[-1] < 0.2 * losses[0] and text == [x[0, 4:16].tolist()]


# ----------------------------------------------------------------------------------------------------------------------
# packing

PACKED = [{}, dict(pos='sinusoidal'), dict(**LLAMA), dict(pos='none'), dict(pos='rope', window=5),
          dict(pos='rope', window=4, n_sink=2, window_pattern='LG'), dict(norm_place='post', causal=False),
          dict(n_expert=4, **LLAMA), dict(lora_rank=2, adapter_dim=2)]


def packed_row(texts, width):
    """Texts one after the other in a row, and padding -> idx, targets, positions, segments (1, width)."""
    idx, targets, positions, segments = (torch.full((1, width), fill) for fill in (0, -100, 0, -1))
    at = 0
    for i, text in enumerate(texts):
        here = slice(at, at + len(text) - 1)
        idx[0, here], targets[0, here] = text[:-1], text[1:]
        positions[0, here], segments[0, here] = torch.arange(len(text) - 1), i
        at += len(text) - 1
    return idx, targets, positions, segments


@pytest.mark.parametrize('options', PACKED, ids=str)
def test_packed_conversations_have_the_loss_of_each_alone(options):
    model = learned(tiny(**options))
    texts = [ids(n, seed=n) for n in (9, 4, 8)]
    idx, targets, positions, segments = packed_row(texts, 22)
    loss = model(idx, targets, positions=positions, segments=segments, reduction='none')
    alone = torch.cat([model(t[None, :-1], t[None, 1:], reduction='none')[0] for t in texts])
    torch.testing.assert_close(loss[targets != -100], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('options', PACKED, ids=str)
def test_packed_conversations_do_not_see_each_other(options):
    model = learned(tiny(**options))
    idx, _, positions, segments = packed_row([ids(n, seed=n) for n in (9, 4, 8)], 22)
    before = model(idx, positions=positions, segments=segments)
    for t in range(idx.shape[1]):
        other = idx.clone()
        other[0, t] = (other[0, t] + 7) % 61
        moved = (model(other, positions=positions, segments=segments) - before).abs().amax(-1)[0]
        moved = moved > (1e-5 if model.sparse else 0)  # grouped products round as their slices lie
        assert moved[t] and not (moved & (segments[0] != segments[0, t])).any()
        assert options.get('causal') is False or not moved[:t].any()


def test_segments_join_a_mask_and_refuse_a_source():
    model, x, mask = tiny(causal=False), ids(1, 8), torch.ones(1, 1, 8, 8, dtype=torch.bool)
    segments, hidden = torch.tensor([[0] * 8]), mask.clone()
    hidden[..., 6:] = False
    torch.testing.assert_close(model(x, segments=segments, mask=hidden)[:, :6], model(x[:, :6]))
    with pytest.raises(ValueError, match='cannot share a source'):
        tiny(n_encoder_layer=1)(x, source=x, segments=segments)


# ----------------------------------------------------------------------------------------------------------------------
# runs, and PEFT

def save_run(directory, state):
    directory.mkdir(parents=True)
    runtime.save_checkpoint(directory / 'ckpt.pt', state)
    return directory


def lora_run(directory, base, **options):
    """A run on the base directory, with random small tensors; also the model."""
    state = convert.load_state(str(base))
    model = learned(GPT.from_state(state, **options), 0.1).eval()
    save_run(directory, {'model': model.small_state(), 'model_args': vars(model.config), 'iter': 3,
                         'tokenizer': state['tokenizer'], 'base': convert.base_of(base, state)})
    return directory, model


ARCH = dict(vocab_size=300, init_std=0.1, mlp_dim=48, **LLAMA)


@pytest.mark.parametrize('options', [dict(lora_rank=2), dict(lora_rank=2, quant='nf4'), dict(adapter_dim=3),
                                     dict(lora_rank=2, adapter_dim=3, quant='nf4')], ids=str)
def test_a_run_of_small_tensors_loads_as_a_whole_model(options, tmp_path):
    base = save_run(tmp_path / 'base', state_of(tiny(**ARCH)))
    run, model = lora_run(tmp_path / 'lora', base, **options)
    assert (run / 'ckpt.pt').stat().st_size < (base / 'ckpt.pt').stat().st_size
    loaded, _ = convert.load_model(str(run))
    x = ids(2, 15)
    torch.testing.assert_close(loaded.eval()(x), model(x), atol=1e-5, rtol=1e-5)
    assert (loaded.config.lora_rank, loaded.config.quant) == (0, '')
    assert loaded.config.adapter_dim == options.get('adapter_dim', 0)
    state = convert.load_state(str(run))
    assert 'base' not in state and state['model_args']['lora_rank'] == 0
    whole = convert.complete(runtime.load_checkpoint(run), str(run))  # what a stage resumes from
    torch.testing.assert_close(GPT.from_state(whole).eval()(x), model(x))
    second, again = lora_run(tmp_path / 'second', run, lora_rank=1)  # a run on a run on a base
    torch.testing.assert_close(convert.load_model(str(second))[0].eval()(x), again(x), atol=1e-5, rtol=1e-5)


def test_a_base_that_is_gone_or_another_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / 'out/base', state_of(tiny(**ARCH)))
    lora_run(tmp_path / 'out/lora', 'out/base', lora_rank=2)
    convert.load_state('out/lora')
    monkeypatch.chdir(tmp_path / 'out/lora')  # found from another folder
    convert.load_state(str(tmp_path / 'out/lora'))
    monkeypatch.chdir(tmp_path)
    other = tiny(**ARCH)
    with torch.no_grad():
        other.blocks[0].mlp.up.weight[0, 0] += 1e-3
    runtime.save_checkpoint(tmp_path / 'out/base/ckpt.pt', state_of(other))
    with pytest.raises(UserError, match=r'^out/lora: its base out/base holds other weights .*put those back$'):
        convert.load_state('out/lora')
    (tmp_path / 'out/base').rename(tmp_path / 'out/gone')
    with pytest.raises(UserError, match=r'^out/lora needs its base out/base: .*put it back there or beside the run$'):
        convert.load_state('out/lora')
    (tmp_path / 'out/lora').rename(tmp_path / 'out/base')
    with pytest.raises(UserError, match='its base out/base is this very directory'):
        convert.load_state('out/base')


def test_fields_of_training_are_no_overrides(tmp_path):
    run = save_run(tmp_path / 'base', state_of(tiny(**ARCH)))
    for key, value in (('lora_rank', 2), ('adapter_dim', 2), ('quant', 'nf4')):
        with pytest.raises(UserError, match=f'{key}=.* is for training on top of a model: drop --{key}'):
            convert.load_model(str(run), **{key: value})


FAMILY = {'llama': ARCH, 'qwen2': ARCH | dict(qkv_bias=True),
          'gpt2': dict(vocab_size=300, init_std=0.1, mlp='gelu_tanh')}


def test_a_peft_directory_has_its_names_and_shapes_and_comes_back(tmp_path):
    base = tiny(**ARCH)
    model = learned(GPT.from_state(state_of(base), lora_rank=3, lora_alpha=5.0, lora_targets='q,v,down', lora_rs=True))
    convert.to_peft(model, tmp_path / 'peft', 'smollm2')
    values = json.loads((tmp_path / 'peft/adapter_config.json').read_text())
    assert values['base_model_name_or_path'] == 'HuggingFaceTB/SmolLM2-135M-Instruct' and values['peft_type'] == 'LORA'
    assert values['target_modules'] == ['mlp.down_proj', 'self_attn.q_proj', 'self_attn.v_proj']
    assert (values['r'], values['lora_alpha'], values['use_rslora']) == (3, 5.0, True)
    tensors = load_file(tmp_path / 'peft/adapter_model.safetensors')
    shapes = {'self_attn.q_proj': (32, 32), 'self_attn.v_proj': (16, 32), 'mlp.down_proj': (32, 48)}
    assert {n: tuple(t.shape) for n, t in tensors.items()} == {
        f'base_model.model.model.layers.{i}.{module}.lora_{kind}.weight': (3, n_in) if kind == 'A' else (n_out, 3)
        for i in range(2) for module, (n_out, n_in) in shapes.items() for kind in 'AB'}
    back = GPT.from_state(convert.from_peft(tmp_path / 'peft', base))
    assert all(torch.equal(back.small_state()[n], t) for n, t in model.small_state().items())
    torch.testing.assert_close(back.eval()(ids(1, 9)), model.eval()(ids(1, 9)))


@pytest.mark.parametrize('change, words', [
    (dict(use_dora=True), 'use_dora=True is not supported'), (dict(bias='all'), "bias='all' is not supported"),
    (dict(rank_pattern={'q_proj': 2}), 'rank_pattern='), (dict(alpha_pattern={'q_proj': 2}), 'alpha_pattern='),
    (dict(modules_to_save=['lm_head']), r"modules_to_save=\['lm_head'\] is not supported"),
    (dict(layers_to_transform=[0]), 'layers_to_transform='), (dict(peft_type='IA3'), "peft_type='IA3' is not 'LORA'"),
    (dict(init_lora_weights='pissa'), "init_lora_weights='pissa' has changed the base too"),
    (dict(r=5), r'lora_A.weight has shape \(3, 32\), not \(5, 32\)'), (dict(r='8'), 'must be a number'),
    (dict(some_new_method={'x': 1}), 'some_new_method=')])
def test_what_peft_computes_otherwise_is_refused_by_its_key(change, words, tmp_path):
    base = tiny(**ARCH)
    convert.to_peft(GPT.from_state(state_of(base), lora_rank=3), tmp_path / 'peft', 'x')
    path = tmp_path / 'peft/adapter_config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=words) as error:
        convert.from_peft(tmp_path / 'peft', base)
    assert '\n' not in str(error.value)


def test_the_command_line_writes_peft_and_a_peft_directory_is_a_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = tiny(**ARCH)
    convert.to_hf(base, tmp_path / 'hf')
    save_run(tmp_path / 'base', state_of(base))
    run, model = lora_run(tmp_path / 'lora', 'base', lora_rank=2, quant='nf4')
    monkeypatch.setattr('sys.argv', ['convert.py', 'lora', 'peft', '--peft'])
    (tmp_path / 'base').rename(tmp_path / 'away')  # not needed
    convert.main()
    assert 'lora -> peft' in capsys.readouterr().out
    with pytest.raises(UserError, match='^peft needs its base base: .*no such run'):
        convert.load_state('peft')
    (tmp_path / 'away').rename(tmp_path / 'base')
    loaded, _ = convert.load_model('peft')
    lora = GPT.from_state(state_of(base), lora_rank=2)
    lora.load_state_dict(model.small_state(), strict=False)
    torch.testing.assert_close(loaded.eval()(ids(1, 9)), lora.eval()(ids(1, 9)), atol=1e-5, rtol=1e-5)


def peft_pair(family, tmp_path):
    peft = pytest.importorskip('peft')
    base = tiny(**FAMILY[family])
    convert.to_hf(base, tmp_path / 'hf')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf', dtype=torch.float32).eval()
    return peft, base, theirs


@pytest.mark.parametrize('family', FAMILY)
@pytest.mark.parametrize('options', [{}, dict(lora_rs=True), dict(lora_targets='q,v,down')], ids=str)
def test_peft_computes_the_same_with_our_lora(family, options, tmp_path):
    peft, base, theirs = peft_pair(family, tmp_path)
    ours = learned(GPT.from_state(state_of(base), lora_rank=3, lora_alpha=5.0, **options), 0.1).eval()
    convert.to_peft(ours, tmp_path / 'peft', str(tmp_path / 'hf'))
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / 'peft')
    x = ids(2, 20)
    torch.testing.assert_close(theirs(x).logits, ours(x), atol=1e-4, rtol=1e-4)
    assert (ours(x) - base(x)).abs().max() > 0.1


@pytest.mark.parametrize('family', FAMILY)
@pytest.mark.parametrize('rs', [False, True])
def test_we_compute_the_same_with_lora_of_peft(family, rs, tmp_path):
    peft, base, theirs = peft_pair(family, tmp_path)
    targets = ['c_attn', 'mlp.c_proj'] if family == 'gpt2' else ['q_proj', 'v_proj', 'gate_proj']
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, use_rslora=rs))
    torch.manual_seed(4)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if 'lora_' in name:
                p.normal_(0, 0.1)
    theirs.eval().save_pretrained(tmp_path / 'peft')
    ours = GPT.from_state(convert.from_peft(tmp_path / 'peft', base)).eval()
    x = ids(2, 20)
    torch.testing.assert_close(ours(x), theirs(x).logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.merged()(x), theirs(x).logits, atol=1e-4, rtol=1e-4)
