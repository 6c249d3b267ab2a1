"""Every promise of README, one short test each; the truth comes from transformers, torch's modules, hand arithmetic."""
import itertools
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

os.environ['TOKENIZERS_PARALLELISM'] = 'false'
import transformers

import model as model_file
from model import GPT, GPTConfig, KVCache, filter_logits

ROOT = Path(__file__).parent
torch.set_num_threads(2)


def tiny(**options):
    """A small random model in evaluation mode; weights large enough that every part of it matters."""
    torch.manual_seed(0)
    args = dict(block_size=24, vocab_size=61, n_layer=2, n_head=4, n_embd=32, init_std=0.2)
    model = GPT(GPTConfig(**args | options)).eval()
    with torch.no_grad():  # biases and norm weights too, or a forgotten one would not show
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.2 * torch.randn_like(p))
    return model


def variants():
    """Choices of every architecture flag: each at least once, and against the others that it touches."""
    yield {}
    for pos, kv, qk in itertools.product(('learned', 'sinusoidal', 'rope', 'none'), (1, 2, 4), (False, True)):
        yield dict(pos=pos, n_kv_head=kv, qk_norm=qk, norm='rmsnorm' if qk else 'layernorm')
    for mlp, place in itertools.product(('gelu', 'gelu_tanh', 'swiglu', 'relu2'), ('pre', 'post')):
        yield dict(mlp=mlp, norm_place=place, bias=mlp != 'swiglu')
    yield dict(pos='rope', norm='rmsnorm', norm_affine=False, qk_norm=True, mlp='relu2', bias=False, tie_weights=False,
               logit_softcap=15.0, attn_scale=0.18, head_dim=6)


VARIANTS = list(variants())


def ids(*shape, vocab=61, seed=0):
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------------------------
# the model against implementations that are not ours

def copy_hf(ours, theirs, fused):
    """Copies a transformers model's weights into ours; fused: GPT-2's transposed (in, out) matrices."""
    state, new = theirs.state_dict(), {}
    for name in ours.state_dict():
        layer = f'.{name.split(".")[1]}.' if name.startswith('blocks') else ''
        kind = name.rsplit('.', 1)[1]
        if fused:
            parts = {'norm1': 'ln_1', 'norm2': 'ln_2', 'qkv': 'attn.c_attn', 'proj': 'attn.c_proj', 'up': 'mlp.c_fc',
                     'down': 'mlp.c_proj'}
            top = {'tok_emb.weight': 'wte.weight', 'pos_emb.weight': 'wpe.weight', 'head.weight': 'wte.weight'}
            source = f'h{layer}{parts[name.split(".")[-2]]}.{kind}' if layer else top.get(name, f'ln_f.{kind}')
            tensor = state[f'transformer.{source}']
            new[name] = tensor.T if layer and tensor.ndim == 2 else tensor
        else:
            parts = {'norm1': 'input_layernorm', 'norm2': 'post_attention_layernorm', 'proj': 'self_attn.o_proj',
                     'up': 'mlp.up_proj', 'gate': 'mlp.gate_proj', 'down': 'mlp.down_proj',
                     'q_norm': 'self_attn.q_norm', 'k_norm': 'self_attn.k_norm'}
            if name.endswith('qkv.weight'):
                new[name] = torch.cat([state[f'model.layers{layer}self_attn.{x}_proj.weight'] for x in 'qkv'])
            elif layer:
                new[name] = state[f'model.layers{layer}{parts[name.split(".")[-2]]}.{kind}']
            else:
                new[name] = state[{'tok_emb.weight': 'model.embed_tokens.weight', 'norm.weight': 'model.norm.weight',
                                   'head.weight': 'lm_head.weight'}[name]]
    ours.load_state_dict(new)


def hf_pair(family):
    """(our model, transformers model) with the same random weights."""
    torch.manual_seed(1)
    if family == 'gpt2':
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=61, n_positions=48, n_embd=32, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0))
        ours = GPT(GPTConfig(vocab_size=61, block_size=48, n_embd=32, n_layer=3, n_head=4, mlp='gelu_tanh'))
    else:
        cls = {'llama': transformers.LlamaConfig, 'qwen3': transformers.Qwen3Config}[family]
        config = cls(vocab_size=61, hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
                     num_key_value_heads=2, head_dim=12, max_position_embeddings=48, rms_norm_eps=1e-6,
                     tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, pad_token_id=0,
                     rope_parameters={'rope_type': 'default', 'rope_theta': 5000.0})
        theirs = transformers.AutoModelForCausalLM.from_config(config)
        ours = GPT(GPTConfig(vocab_size=61, block_size=48, n_embd=32, n_layer=3, n_head=4, n_kv_head=2, head_dim=12,
                             mlp_dim=80, mlp='swiglu', norm='rmsnorm', norm_eps=1e-6, pos='rope', rope_theta=5000.0,
                             bias=False, tie_weights=False, qk_norm=family == 'qwen3'))
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    copy_hf(ours, theirs, family == 'gpt2')
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize('family', ['gpt2', 'llama', 'qwen3'])
def test_logits_and_greedy_text_equal_transformers(family):
    ours, theirs = hf_pair(family)
    x = ids(3, 48)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x).logits, atol=1e-4, rtol=1e-4)
    theirs.generation_config.eos_token_id = None
    prompts = [x[0, :7].tolist(), x[1, :3].tolist(), x[2, :12].tolist()]
    for prompt, new in zip(prompts, ours.generate(prompts, 30, temperature=0), strict=True):
        x = torch.tensor([prompt])
        expected = theirs.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=30, do_sample=False)
        assert new == expected[0, len(prompt):].tolist()


@pytest.mark.parametrize('place', ['pre', 'post'])
@pytest.mark.parametrize('causal', [True, False])
def test_blocks_equal_torch_transformer_encoder(place, causal):
    ours = tiny(norm_place=place, causal=causal, pos='none')
    layer = torch.nn.TransformerEncoderLayer(32, 4, 128, dropout=0.0, activation='gelu', batch_first=True,
                                             norm_first=place == 'pre')
    theirs = torch.nn.TransformerEncoder(layer, 2, norm=torch.nn.LayerNorm(32) if place == 'pre' else None,
                                         enable_nested_tensor=False)
    names = {'norm1': 'norm1', 'norm2': 'norm2', 'attn.qkv': 'self_attn.in_proj_', 'attn.proj': 'self_attn.out_proj',
             'mlp.up': 'linear1', 'mlp.down': 'linear2'}
    state = {}
    for name, tensor in ours.state_dict().items():
        for mine, other in names.items():
            if f'.{mine}.' in name:
                state[name.replace('blocks', 'layers').replace(mine, other).replace('proj_.', 'proj_')] = tensor
        if name in ('norm.weight', 'norm.bias'):
            state[name] = tensor
    theirs.load_state_dict(state)
    x, lengths = ids(3, 20), torch.tensor([20, 11, 5])
    padding = torch.arange(20) >= lengths[:, None]
    square = torch.nn.Transformer.generate_square_subsequent_mask(20) if causal else None
    with torch.no_grad():
        expected = theirs(ours.tok_emb(x), mask=square, src_key_padding_mask=padding.float() * -1e9)
        got = ours.hidden(x, mask=~padding[:, None, None, :])
    torch.testing.assert_close(got[~padding], expected[~padding], atol=1e-5, rtol=1e-4)


def test_sinusoidal_positions_by_hand():
    table = model_file.sinusoidal(torch.arange(5), 8)
    for pos, i in itertools.product(range(5), range(4)):
        angle = pos / 10000 ** (2 * i / 8)
        assert table[pos, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
        assert table[pos, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)
    model = tiny(pos='sinusoidal')
    first = model.tok_emb(ids(1, 5)) * math.sqrt(32) + model_file.sinusoidal(torch.arange(5), 32)
    for block in model.blocks:
        first = block(first)
    torch.testing.assert_close(model.logits(model.norm(first)), model(ids(1, 5)))


# ----------------------------------------------------------------------------------------------------------------------
# properties of every variant

@pytest.mark.parametrize('options', VARIANTS, ids=str)
def test_future_and_padding_change_nothing(options):
    model, x = tiny(**options), ids(2, 20)
    with torch.no_grad():
        before = model(x)
        changed = x.clone()
        changed[:, 13:] = (x[:, 13:] + 1) % 61
        after = model(changed)
        assert torch.allclose(before[:, :13], after[:, :13], atol=1e-5) and not torch.allclose(before, after, atol=1e-3)
        encoder = tiny(**options | {'causal': False})
        keys = (torch.arange(20) < 13)[None, None, None, :]
        assert torch.allclose(encoder(x, mask=keys)[:, :13], encoder(changed, mask=keys)[:, :13], atol=1e-5)
        assert not torch.allclose(encoder(x)[:, 0], encoder(changed)[:, 0], atol=1e-3)  # it does look ahead
        alone = encoder(x[:, :13])
        torch.testing.assert_close(encoder(x, mask=keys)[:, :13], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('options', VARIANTS, ids=str)
def test_cached_logits_equal_full_forward(options):
    model, x, lengths = tiny(**options), ids(3, 24), [9, 4, 13]
    with torch.no_grad():
        full = model(x)
        cache = KVCache(model.config, 3, 24, 'cpu', torch.float32)
        logits = model.next_logits([row[:n].tolist() for row, n in zip(x, lengths, strict=True)], cache)
        for _ in range(10):
            expected = torch.stack([full[b, n - 1] for b, n in enumerate(cache.lengths)])
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
            step = torch.stack([x[b, n:n + 1] for b, n in enumerate(cache.lengths)])
            logits = model.logits(model.hidden(step, cache=cache)[:, -1])
            cache.lengths = [n + 1 for n in cache.lengths]
        cache.select([2, 0])  # rows leave, three tokens arrive at once
        rest = torch.stack([x[b, n:n + 1] for b, n in zip((2, 0), cache.lengths, strict=True)])
        got = model.logits(model.hidden(rest, cache=cache))
        for i, b in enumerate((2, 0)):
            n = cache.lengths[i]
            torch.testing.assert_close(got[i], full[b, n:n + 1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('options', VARIANTS[:24:3] + VARIANTS[-1:], ids=str)
def test_generation_with_and_without_cache(options):
    """Ragged prompts, past the block, stop tokens: the same ids, and log-probabilities of the training forward."""
    model = tiny(**options)
    prompts = [[1, 2, 3], [4], ids(20).tolist()]
    common = dict(temperature=0.9, seed=3, stop_ids=(7,), return_logprobs=True, num_samples=2)
    new, logprobs = model.generate(prompts, 40, **common)
    again, others = model.generate(prompts, 40, use_cache=False, **common)
    assert new == again and len(new) == 6 and max(map(len, new)) > 24
    np.testing.assert_allclose(sum(logprobs, []), sum(others, []), atol=1e-4)
    for i, row in enumerate(new):
        assert 7 not in row[:-1] and (len(row) == 40 or row[-1] == 7)
        text = prompts[i // 2] + row
        inside = min(len(text), 24)  # before the context had to be cut
        with torch.no_grad():
            expected = F.log_softmax(model(torch.tensor([text[:inside]])) / 0.9, -1)[0]
        at = len(prompts[i // 2])
        for j in range(at, inside):
            assert logprobs[i][j - at] == pytest.approx(expected[j - 1, text[j]].item(), abs=1e-4)


def test_a_row_does_not_depend_on_when_others_stop():
    model = tiny(pos='rope')
    free = model.generate([[1], [2], [3]], 20, seed=5)
    stopped = model.generate([[1], [2], [3]], 20, seed=5, stop_ids=(free[0][2],))
    for a, b in zip(free, stopped, strict=True):
        assert a[:len(b)] == b
    assert len(stopped[0]) == 3 and model.generate([[1], [2], [3]], 20, seed=6) != free


def test_filters_equal_transformers():
    logits = torch.randn(5, 61, generator=torch.Generator().manual_seed(0)) * 3
    from transformers.generation import logits_process as hf
    for mine, theirs in ((dict(top_k=7), hf.TopKLogitsWarper(7)), (dict(top_p=0.8), hf.TopPLogitsWarper(0.8)),
                         (dict(min_p=0.05), hf.MinPLogitsWarper(0.05)), (dict(top_k=1000), hf.TopKLogitsWarper(1000)),
                         (dict(top_p=1e-6), hf.TopPLogitsWarper(1e-6))):
        assert torch.equal(filter_logits(logits, **mine), theirs(None, logits)), mine
    texts = [[1, 5, 5], [2], [3, 60], [0], [9]]
    penalised = torch.cat([hf.RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([t]), row[None])
                           for t, row in zip(texts, logits, strict=True)])
    greedy, _ = model_file.sample(logits.clone(), texts, None, 0, 0, 1.0, 0.0, 1.7)
    assert greedy == penalised.argmax(-1).tolist()


def test_samples_have_the_models_distribution():
    model = tiny(vocab_size=5, init_std=1.0)
    with torch.no_grad():
        probs = F.softmax(model(torch.tensor([[1, 2]]))[0, -1] / 0.7, -1).numpy()
    drawn = model.generate([[1, 2]], 1, temperature=0.7, num_samples=20000, seed=0)
    counts = np.bincount(np.array(drawn)[:, 0], minlength=5)
    chi2 = ((counts - 20000 * probs) ** 2 / (20000 * probs)).sum()
    assert chi2 < 18.5, (counts, probs)  # 4 degrees of freedom: exceeded by chance once in a thousand seeds


def test_dropout_is_off_in_generation_and_restored():
    model = tiny(dropout=0.5).train()
    assert model.generate([[1, 2]], 20, temperature=0) == model.eval().generate([[1, 2]], 20, temperature=0)
    model.train()
    stream = model.stream([[1, 2]], 20)
    next(stream)
    stream.close()
    assert model.training


@pytest.mark.parametrize('call, words', [
    (lambda m: m.generate([[1], []], 3), 'prompt 1 is empty'),
    (lambda m: m.generate([[1, 61]], 3), 'token id 61 is outside the vocabulary of 61'),
    (lambda m: m.generate([[1] * 25], 3), 'learned positions end at block_size=24'),
    (lambda m: m.generate([[1]], 3, top_p=0.0), 'top_p'),
    (lambda m: m(torch.zeros(1, 25, dtype=torch.long)), 'block_size=24'),
    (lambda m: GPT(GPTConfig(causal=False, n_layer=1, n_embd=12)).generate([[1]], 3), 'encoder'),
    (lambda m: GPTConfig(n_embd=100, n_head=3), 'n_embd=100 is not divisible by n_head=3'),
    (lambda m: GPTConfig(n_head=12, n_kv_head=5), 'n_kv_head=5'),
    (lambda m: GPTConfig(mlp='gelo'), "mlp='gelo'"),
    (lambda m: GPTConfig(pos='rope', n_embd=36, n_head=12), 'head_dim=3 must be even'),
    (lambda m: m.configure_optimizers('sgd'), "optimizer='sgd'"),
])
def test_impossible_requests_raise_one_sentence(call, words):
    with pytest.raises(ValueError, match='.') as error:
        call(tiny())
    assert words in str(error.value) and '\n' not in str(error.value)


def test_rotary_prompt_longer_than_the_block_goes_on():
    model = tiny(pos='rope')
    prompt = ids(60).tolist()
    assert model.generate([prompt], 5, temperature=0) == model.generate([prompt[-24:]], 5, temperature=0)


# ----------------------------------------------------------------------------------------------------------------------
# loss, initialisation, optimizers

@pytest.mark.parametrize('cap', [0.0, 4.0])
@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
def test_chunked_loss_equals_cross_entropy(cap, reduction, monkeypatch):
    x, y = ids(3, 20), ids(3, 20, seed=1)
    y[0, :5] = -100
    weights = torch.rand(3, 20, generator=torch.Generator().manual_seed(2))

    def run(chunk):
        monkeypatch.setattr(model_file, 'CHUNK', chunk)
        model = tiny(logit_softcap=cap)
        loss = model(x, y, reduction=reduction)
        (loss * weights if reduction == 'none' else 3 * loss).sum().backward()
        return loss.detach(), [p.grad for p in model.parameters()]

    model = tiny(logit_softcap=cap)
    logits = model.head(model.hidden(x))
    logits = cap * torch.tanh(logits / cap) if cap else logits
    expected = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-100, reduction=reduction)
    expected = expected.view(3, 20) if reduction == 'none' else expected
    (expected * weights if reduction == 'none' else 3 * expected).sum().backward()
    for chunk in (61 * 7, 1 << 24):  # in chunks of 7 rows; all at once
        loss, grads = run(chunk)
        torch.testing.assert_close(loss, expected.detach(), atol=1e-5, rtol=1e-5)
        for got, p in zip(grads, model.parameters(), strict=True):
            torch.testing.assert_close(got, p.grad, atol=1e-5, rtol=1e-4)


def test_initialisation_of_gpt2_and_zero_init():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=8, n_head=4, n_embd=128, vocab_size=1000))
    block = model.blocks[3]
    for p, std in ((block.attn.qkv.weight, 0.02), (block.mlp.up.weight, 0.02), (model.tok_emb.weight, 0.02),
                   (block.attn.proj.weight, 0.02 / 4), (block.mlp.down.weight, 0.02 / 4)):  # 0.02 / sqrt(2 * 8)
        assert p.std().item() == pytest.approx(std, rel=0.05) and abs(p.mean().item()) < std / 20
    assert not block.attn.qkv.bias.any() and (block.norm1.weight == 1).all()
    zero = GPT(GPTConfig(n_layer=2, n_head=4, n_embd=32, vocab_size=61, zero_init=True, tie_weights=False))
    assert zero(ids(2, 8), ids(2, 8, seed=1)).item() == pytest.approx(math.log(61))


def test_adamw_decays_matrices_only():
    model = tiny()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer, = model.configure_optimizers('adamw', 0.1, weight_decay=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (1 - 0.1 * 0.5) if p.ndim >= 2 else before[name])


def test_flops_equal_torch_counter():
    from torch.utils.flop_counter import FlopCounterMode
    model = tiny(n_kv_head=2, mlp='swiglu', tie_weights=False)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(ids(2, 24)).sum().backward()
    assert counter.get_total_flops() == pytest.approx(48 * model.flops_per_token(24), rel=0.05)
