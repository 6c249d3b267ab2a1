"""
Every architecture of this project in one file that imports only torch: a GPT-2, a Llama-like decoder, a mixture of
experts, the Transformer's encoder and decoder are choices of GPTConfig's values, and what a value switches is an `if`
where it happens.

    model = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=128, vocab_size=65, block_size=64))
    logits = model(idx)                          # (B, T) ids -> (B, T, V)
    loss = model(idx, targets)                   # mean over the targets that are not -100
    new_ids = model.generate([[1, 2, 3], [4]], max_new_tokens=20)
    loss = model(idx, targets, source=source)    # n_encoder_layer > 0: (B, S) ids that the decoder attends to
    scores = model(idx, real=real)               # score_head: (B,), one number for the real tokens of each text
    model = GPT.from_state(state, lora_rank=8, quant='nf4').freeze()    # a few new weights beside a frozen model

    python model.py                              self-attention with numbers for a pencil, and what GPT-2 consists of
    python model.py config/tiny.py --vocab_size=1024    what a config makes: parameters, FLOP and memory

Papers: Attention Is All You Need (arXiv:1706.03762), GPT-2 (Radford et al. 2019), RoFormer (arXiv:2104.09864),
Root Mean Square Layer Normalization (arXiv:1910.07467), GLU Variants Improve Transformer (arXiv:2002.05202),
Primer / squared ReLU (arXiv:2109.08668), GQA (arXiv:2305.13245), QK-norm (arXiv:2010.04245), Muon (arXiv:2502.16982),
Switch Transformers (arXiv:2101.03961), ST-MoE (arXiv:2202.08906), DeepSeekMoE (arXiv:2401.06066), balancing without a
loss (arXiv:2408.15664), Longformer's window (arXiv:2004.05150), attention sinks (arXiv:2309.17453), adapters
(arXiv:1902.00751), LoRA (arXiv:2106.09685), rsLoRA (arXiv:2312.03732), QLoRA (arXiv:2305.14314).
"""
import contextlib
import functools
import math
from dataclasses import dataclass, fields, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

LORA_TARGETS = ('q', 'k', 'v', 'proj', 'gate', 'up', 'down')


@dataclass
class GPTConfig:
    """The defaults are GPT-2 124M. Raises ValueError with one sentence when values cannot go together."""
    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50257  # number of token ids; a stage takes the tokenizer's unless it is told
    n_layer: int = 12  # number of transformer blocks
    n_head: int = 12  # query heads per block
    n_kv_head: int = 0  # key/value heads: 0 = n_head (multi-head), 1 = multi-query, between = grouped-query
    n_embd: int = 768  # width of the residual stream
    head_dim: int = 0  # width of one head; 0 = n_embd / n_head
    mlp_dim: int = 0  # hidden width of the MLP; 0 = 4 n_embd (swiglu: 8/3 n_embd, rounded up to a multiple of 64)
    mlp: str = 'gelu'  # 'gelu', 'gelu_tanh' (GPT-2's own weights), 'swiglu' or 'relu2'
    norm: str = 'layernorm'  # 'layernorm' or 'rmsnorm'
    norm_place: str = 'pre'  # 'pre' (norm, sublayer, add) or 'post' (sublayer, add, norm)
    norm_affine: bool = True  # learned weight in the norms
    norm_eps: float = 1e-5  # added to the variance
    qk_norm: bool = False  # normalise queries and keys per head, before the rotation
    pos: str = 'learned'  # positions: 'learned', 'sinusoidal', 'rope' or 'none'
    rope_theta: float = 10000.0  # base of the rotary wavelengths
    rope_scaling: str = 'none'  # a longer context than trained on: 'linear', 'llama3' or 'yarn' stretch the wavelengths
    rope_factor: float = 1.0  # how many times longer
    rope_original: int = 0  # the context trained on ('llama3', 'yarn'); 0 = block_size / rope_factor
    rope_low: float = 0.0  # turns over that context up to which a wavelength is stretched whole; 0 = 1
    rope_high: float = 0.0  # turns from which it stays as it is; 0 = 4 ('llama3') or 32 ('yarn')
    attn_scale: float = 0.0  # factor on query-key products; 0 = 1 / sqrt(head_dim)
    bias: bool = True  # biases in linear layers and layernorms
    qkv_bias: bool = False  # without bias: one for queries, keys and values all the same (Qwen2)
    tie_weights: bool = True  # the output head shares the token embedding
    causal: bool = True  # False: every token sees all others (encoder)
    dropout: float = 0.0  # on embeddings, attention weights and sublayer outputs
    logit_softcap: float = 0.0  # logits -> cap * tanh(logits / cap); 0 = off
    window: int = 0  # sliding window: a query sees this many tokens, itself included; 0 = all before it
    window_pattern: str = 'L'  # layers in turn, again and again: L = local, with the window, G = global
    n_sink: int = 0  # first tokens of a text that a window never leaves behind
    n_expert: int = 0  # experts in place of the MLP, none with a bias; 0 = a dense MLP
    n_expert_active: int = 2  # experts that a token is sent to
    n_expert_shared: int = 0  # further experts that every token is sent to
    expert_dim: int = 0  # hidden width of an expert; 0 = mlp_dim
    dense_layers: int = 0  # the first so many layers keep a dense MLP
    expert_every: int = 1  # of the others one layer in this many has experts
    router_renorm: bool = True  # the weights of a token's active experts add up to 1
    router_aux: float = 0.0  # weight of the loss that balances the experts' load; 0.01 is usual
    router_z: float = 0.0  # weight of the loss that keeps router logits small; 0.001 is usual
    router_bias_rate: float = 0.0  # balance by a bias on the choice, moved so far per step; 0.001 is usual
    score_head: str = ''  # a reward model: a number per text, read at its 'last' token or from the 'mean' of all
    score_likelihood: bool = False  # the score also counts the answer's log-probability, by the other head, which stays
    n_encoder_layer: int = 0  # blocks of a bidirectional encoder that the decoder attends to; 0 = no encoder
    lora_rank: int = 0  # rank of the updates that LoRA learns beside the blocks' frozen matrices; 0 = none
    lora_alpha: float = 16.0  # the updates are multiplied by lora_alpha / lora_rank
    lora_dropout: float = 0.0  # on what the updates read
    lora_targets: str = 'q,k,v,proj,gate,up,down'  # the matrices that have an update, those of them that the model has
    lora_rs: bool = False  # lora_alpha / sqrt(lora_rank) instead (rsLoRA)
    adapter_dim: int = 0  # width of the bottleneck that adapters learn behind each frozen sublayer; 0 = none
    quant: str = ''  # 'nf4': the blocks' frozen matrices in 4 bits, embeddings and head in bfloat16 (QLoRA)
    init_std: float = 0.02  # standard deviation of initial weights; 0 = 1 / sqrt(fan-in), and 1 for embeddings
    zero_init: bool = False  # projections into the residual stream and an untied head start at zero

    def __post_init__(self):
        for name, allowed in (('mlp', ('gelu', 'gelu_tanh', 'swiglu', 'relu2')), ('norm', ('layernorm', 'rmsnorm')),
                              ('norm_place', ('pre', 'post')), ('pos', ('learned', 'sinusoidal', 'rope', 'none')),
                              ('rope_scaling', ('none', 'linear', 'llama3', 'yarn')), ('quant', ('', 'nf4')),
                              ('score_head', ('', 'last', 'mean'))):
            if getattr(self, name) not in allowed:
                raise ValueError(f'{name}={getattr(self, name)!r} is not one of {", ".join(map(repr, allowed))}')
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)} must be at least 1')
        for name in ('n_kv_head', 'head_dim', 'mlp_dim', 'norm_eps', 'attn_scale', 'logit_softcap', 'init_std',
                     'rope_original', 'rope_low', 'rope_high', 'window', 'n_sink', 'n_expert', 'n_expert_shared',
                     'expert_dim', 'dense_layers', 'router_aux', 'router_z', 'router_bias_rate', 'n_encoder_layer',
                     'lora_rank', 'lora_alpha', 'adapter_dim'):
            if getattr(self, name) < 0:
                raise ValueError(f'{name}={getattr(self, name)} must not be negative')
        for name in ('dropout', 'lora_dropout'):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)} must be in [0, 1)')
        if not self.head_dim and self.n_embd % self.n_head:
            raise ValueError(f'n_embd={self.n_embd} is not divisible by n_head={self.n_head} (or set head_dim)')
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        default_mlp = -(-8 * self.n_embd // (3 * 64)) * 64 if self.mlp == 'swiglu' else 4 * self.n_embd
        self.mlp_dim = self.mlp_dim or default_mlp
        if self.n_head % self.n_kv_head:
            raise ValueError(f'n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}')
        self.expert_dim = self.expert_dim or self.mlp_dim
        if self.n_expert and not 1 <= self.n_expert_active <= self.n_expert:
            raise ValueError(f'n_expert_active={self.n_expert_active} must be between 1 and n_expert={self.n_expert}')
        if self.n_expert and (self.n_embd % 8 or self.expert_dim % 8):
            raise ValueError(f'n_embd={self.n_embd} and expert_dim={self.expert_dim} must be multiples of 8, as '
                             'grouped matrix products in 16 bits want them')
        if self.expert_every < 1:
            raise ValueError(f'expert_every={self.expert_every} must be at least 1')
        if not self.window_pattern or set(self.window_pattern) - set('LG'):
            raise ValueError(f'window_pattern={self.window_pattern!r} must be made of the letters L and G')
        if self.score_head and self.n_encoder_layer:
            raise ValueError(f'score_head={self.score_head!r} needs a decoder or an encoder alone: n_encoder_layer=0')
        if self.score_likelihood and not (self.score_head and self.causal):
            raise ValueError('score_likelihood=True needs a score_head and causal=True')
        if (self.window or self.n_encoder_layer) and not self.causal:
            name = 'window' if self.window else 'n_encoder_layer'
            raise ValueError(f'{name}={getattr(self, name)} needs causal=True')
        if self.n_sink and not self.window:
            raise ValueError(f'n_sink={self.n_sink} needs a window')
        if self.pos == 'rope' and self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even with pos='rope'")
        if self.pos == 'sinusoidal' and self.n_embd % 2:
            raise ValueError(f"n_embd={self.n_embd} must be even with pos='sinusoidal'")
        if self.rope_theta <= 1:
            raise ValueError(f'rope_theta={self.rope_theta} must be above 1')
        if self.rope_scaling != 'none':
            if self.pos != 'rope' or self.rope_factor <= 1:
                raise ValueError(f"rope_scaling={self.rope_scaling!r} needs pos='rope' and a rope_factor above 1")
            self.rope_original = self.rope_original or max(1, int(self.block_size / self.rope_factor))
            self.rope_low = self.rope_low or 1.0
            self.rope_high = self.rope_high or (4.0 if self.rope_scaling == 'llama3' else 32.0)
            if self.rope_high <= self.rope_low:
                raise ValueError(f'rope_high={self.rope_high} must be above rope_low={self.rope_low}')

        targets = self.lora_parts()
        if unknown := sorted(targets - set(LORA_TARGETS)):
            raise ValueError(f'lora_targets={self.lora_targets!r}: {unknown[0]!r} is not one of '
                             f'{", ".join(LORA_TARGETS)}')
        dense = self.n_expert_shared or self.n_encoder_layer or not all(map(self.is_sparse, range(self.n_layer)))
        there = {'q', 'k', 'v', 'proj', *(('up', 'down') if dense else ()),
                 *(('gate',) if dense and self.mlp == 'swiglu' else ())}
        if self.lora_rank and not targets & there:
            raise ValueError(f'lora_targets={self.lora_targets!r}: this model has none of them')
        if self.quant and not (self.lora_rank or self.adapter_dim):
            raise ValueError(f'quant={self.quant!r} freezes the matrices: without lora_rank or adapter_dim nothing '
                             'could be trained')

    def lora_parts(self):
        """The names in lora_targets, a set."""
        return {name.strip() for name in self.lora_targets.split(',')} - {''}

    def is_local(self, layer):
        """Whether this layer's attention has the window."""
        return self.window > 0 and self.window_pattern[layer % len(self.window_pattern)] == 'L'

    def is_sparse(self, layer):
        """Whether this layer has experts."""
        return self.n_expert > 0 and layer >= self.dense_layers and (layer + 1) % self.expert_every == 0


# ----------------------------------------------------------------------------------------------------------------------
# modules without memory

class SkipInit(torch.overrides.TorchFunctionMode):
    """Inside, the functions of torch.nn.init leave a tensor as it is."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, '__module__', '') == 'torch.nn.init':
            return kwargs['tensor']
        return function(*args, **kwargs or {})


@contextlib.contextmanager
def on_meta():
    """Inside, modules are made on the meta device: their parameters have shapes and no values.

    Nothing is drawn for them, which there would first import PyTorch's compiler, for a second.
    """
    with torch.device('meta'), SkipInit():
        yield


# ----------------------------------------------------------------------------------------------------------------------
# parts of a block

class CPURMSNorm(torch.autograd.Function):
    """F.rms_norm for float32 on a CPU, where PyTorch strings it together from small operations: the time goes to
    reading and writing memory, and this passes over it half as often."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        """x (…, D); weight (D,), or any shape that broadcasts to x."""
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx, g):
        """With y = w x s and s = (mean(x^2) + eps)^(-1/2): dx = g w s - x s^3 mean(g w x), dw = sum(g x s)."""
        x, weight, scale = ctx.saved_tensors
        gx = g * x
        through_scale = (gx * weight).sum(-1, keepdim=True).mul_(scale.pow(3)).div_(-x.shape[-1])
        dx = (g * weight).mul_(scale).addcmul_(x, through_scale)
        return dx, gx.mul_(scale).sum_to_size(weight.shape) if ctx.needs_input_grad[1] else None, None


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv:1910.07467); weight None = 1."""
    if torch.compiler.is_compiling():  # which makes one kernel of it by itself
        plain = False
    else:  # a student and its teacher, with and without gradients, round alike; generation has other kernels anyhow
        plain = x.device.type == 'cpu' and x.dtype == torch.float32 and not torch.is_inference_mode_enabled()
    if plain:
        return CPURMSNorm.apply(x, x.new_ones(x.shape[-1]) if weight is None else weight, eps)
    if weight is None or weight.ndim == 1:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return F.rms_norm(x, x.shape[-1:], None, eps) * weight


class Norm(nn.Module):
    """LayerNorm, or RMSNorm (arXiv:1910.07467), over the last dimension; weight and bias as the config says."""

    def __init__(self, dim, config):
        super().__init__()
        self.shape, self.eps, self.rms = (dim,), config.norm_eps, config.norm == 'rmsnorm'
        self.weight = nn.Parameter(torch.ones(dim)) if config.norm_affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if config.norm_affine and config.bias and not self.rms else None

    def forward(self, x):
        # weights and x may differ: autocast makes queries and keys 16 bits wide, sharding the weights
        weight, bias = (None if p is None else p.type_as(x) for p in (self.weight, self.bias))
        if self.rms:
            return rms_norm(x, weight, self.eps)
        return F.layer_norm(x, self.shape, weight, bias, self.eps)


def frequencies(dim, theta, device=None):
    """theta^(-2i / dim) for i below dim / 2, in radians per position (arXiv:1706.03762): (dim / 2,) float32."""
    return theta ** (-torch.arange(0, dim, 2, device=device).float() / dim)


def sinusoidal(positions, dim):
    """The sines (even columns) and cosines (odd) of section 3.5 of arXiv:1706.03762: (…,) -> (…, dim) float32."""
    a = positions.float()[..., None] * frequencies(dim, 10000.0, positions.device)
    return torch.stack((a.sin(), a.cos()), dim=-1).flatten(-2)


def rope_tables(config):
    """cos and sin (positions, head_dim) of `apply_rope`, with the wavelengths stretched as rope_scaling says.

    'linear' (arXiv:2306.15595) stretches all of them by rope_factor; the others keep those that turn often within the
    original context: 'llama3' (arXiv:2407.21783) blends by the number of turns, 'yarn' (arXiv:2309.00071) by the index
    of the pair, and sharpens attention by 0.1 ln(rope_factor) + 1, here a factor on both tables.
    """
    f, dim = frequencies(config.head_dim, config.rope_theta), config.head_dim
    sharpen, low, high = 1.0, config.rope_low, config.rope_high
    if config.rope_scaling == 'linear':
        f = f / config.rope_factor
    elif config.rope_scaling == 'llama3':
        turns = config.rope_original * f / (2 * math.pi)
        stay = ((turns - low) / (high - low)).clamp(0, 1)
        f = f * stay + f / config.rope_factor * (1 - stay)
    elif config.rope_scaling == 'yarn':
        first, last = (dim * math.log(config.rope_original / (n * 2 * math.pi)) / (2 * math.log(config.rope_theta))
                       for n in (high, low))  # the pairs that make so many turns
        first, last = max(math.floor(first), 0), min(math.ceil(last), dim - 1)
        stretch = ((torch.arange(dim // 2) - first) / max(last - first, 1e-3)).clamp(0, 1)
        f = f * (1 - stretch) + f / config.rope_factor * stretch
        sharpen = 0.1 * math.log(config.rope_factor) + 1
    # a stream's positions stay within a window, but it is read a block at a time
    n = config.block_size + (config.n_sink + config.window if config.window else 0)
    a = torch.arange(n).float()[:, None] * f
    cos, sin = a.cos() * sharpen, a.sin() * sharpen
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def apply_rope(x, cos, sin):
    """Rotates the pairs (x[i], x[i + D/2]) of x (…, D), the half-split convention of Llama (arXiv:2104.09864).

    cos and sin (…, D), broadcast over heads, hold each pair's value twice, the sine negative in the first half.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def windowed(queries, keys, config):
    """Which keys lie in the window of a query, or are sinks: positions (…, T) and (…, S) -> bool (…, T, S)."""
    return (queries[..., :, None] - keys[..., None, :] < config.window) | (keys < config.n_sink)[..., None, :]


def far_sinks(q, q_far, k, v, is_sink):
    """Attention in which sinks stand at another distance than the rest -> q, k of twice the width, and v as wide.

    Of a query's two rotations one meets the sinks, the other all else: where a key does not belong its half is zero.
    """
    k = torch.cat((k.masked_fill(is_sink, 0), k.masked_fill(~is_sink, 0)), -1)
    return torch.cat((q, q_far), -1), k, F.pad(v, (0, v.shape[-1]))  # kernels want one width


def attend(q, k, v, mask, causal, scale, dropout=0.0):
    """softmax(q k^T scale) v over q (B, H, T, D) and k, v (B, Hkv, S, D); mask: bool (…, T, S), a BlockMask or None."""
    gqa = q.shape[1] != k.shape[1]
    if mask is not None and not isinstance(mask, torch.Tensor):
        from torch.nn.attention.flex_attention import flex_attention  # here, for it takes a second to import
        flex = flex_attention if torch.compiler.is_compiling() else compiled_flex()
        return flex(q, k, v, block_mask=mask, scale=scale, enable_gqa=gqa)
    shape = q.shape
    if gqa and shape[2] == 1 and q.dtype != torch.float32:
        # the heads that share keys and values become queries of one head: these are read once (CPU: 4 x faster)
        q, gqa = q.reshape(shape[0], k.shape[1], -1, shape[3]), False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and mask is None and shape[2] > 1,
                                          scale=scale, dropout_p=dropout, enable_gqa=gqa).reshape(shape)


def attention_weights(q, k, mask, causal, scale):
    """softmax(q k^T scale) itself, which `attend` never makes, for a reader to look at: (B, H, T, S) float32."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = (q.float() @ k.float().mT) * scale
    if mask is None and causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
    return (scores if mask is None else scores.masked_fill(~mask, -math.inf)).softmax(-1)


@functools.cache
def compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention
    return torch.compile(flex_attention)  # only so does it leave out the blocks that nobody sees


# ----------------------------------------------------------------------------------------------------------------------
# few weights that learn beside many that are frozen

# the quantiles of a normal distribution of appendix E of arXiv:2305.14314, with a zero and the ends at -1 and 1
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)


def nf4_quantize(w):
    """Numbers of any shape -> codes (n / 2,) uint8, two each, the first high; scales (blocks,) float32.

    A number is the nearest of 16 levels times the scale of its block of 64, the largest magnitude there
    (arXiv:2305.14314, section 3). The last block is filled up with zeros.
    """
    blocks = F.pad(w.float().flatten(), (0, -w.numel() % 64)).view(-1, 64)
    scales = blocks.abs().amax(1)
    levels = torch.tensor(NF4, device=w.device)
    codes = torch.bucketize(blocks / scales.clamp(min=1e-30)[:, None], (levels[1:] + levels[:-1]) / 2, out_int32=True)
    high, low = codes.to(torch.uint8).view(-1, 2).unbind(1)
    return high << 4 | low, scales


def pack_scales(scales):
    """Double quantisation (arXiv:2305.14314, section 3): scales (blocks,) -> (packed uint8, steps, mean).

    packed holds 8-bit floats, bytes so that no conversion of a model's dtype touches them, which times the step of
    their 256 and plus the mean of all are the scales; it is padded to a multiple of 256.
    """
    mean = scales.mean()
    groups = F.pad(scales - mean, (0, -len(scales) % 256)).view(-1, 256)
    steps = groups.abs().amax(1) / torch.finfo(torch.float8_e4m3fn).max
    packed = (groups / steps.clamp(min=1e-30)[:, None]).to(torch.float8_e4m3fn)
    return packed.flatten().view(torch.uint8), steps, mean


def unpack_scales(packed, steps, mean):
    """What `pack_scales` gave -> scales float32, padded to a multiple of 256."""
    return (packed.view(torch.float8_e4m3fn).float().view(-1, 256) * steps[:, None] + mean).flatten()


@functools.cache
def nf4_table(dtype, device):
    """The four levels of any two bytes of codes, as one wide number: (65536,). One look-up instead of four."""
    with torch.inference_mode(False):
        levels = torch.tensor(NF4, dtype=dtype, device=device)
        pairs = torch.arange(1 << 16, device=device).to(torch.uint16).view(torch.uint8).long()
        quads = levels[torch.stack((pairs >> 4, pairs & 15), -1).flatten()]
        return quads.view(torch.complex128 if dtype == torch.float32 else torch.float64)


def nf4_dequantize(codes, scales, shape, dtype):
    """Codes and scales of `nf4_quantize` -> the numbers, of this shape; in 16 bits levels and scales are rounded."""
    if torch.compiler.is_compiling():  # into one kernel with what follows
        nibbles = torch.stack((codes >> 4, codes & 15), -1).int()
        blocks = torch.tensor(NF4, dtype=dtype, device=codes.device)[nibbles].view(-1, 64)
    else:
        pairs = codes.view(torch.uint16).int()
        blocks = nf4_table(dtype, codes.device).index_select(0, pairs).view(dtype).view(-1, 64)
    return blocks.mul_(scales[:len(blocks), None].to(dtype)).flatten()[:math.prod(shape)].view(shape)


class NF4Product(torch.autograd.Function):
    """x (…, in) @ W.T of a frozen W (out, in) in 4 bits, which is whole during the products of both passes only."""

    @staticmethod
    def forward(ctx, x, shape, codes, *packed):
        ctx.save_for_backward(codes, *packed)
        ctx.shape = shape
        return F.linear(x, nf4_dequantize(codes, unpack_scales(*packed), shape, x.dtype))

    @staticmethod
    def backward(ctx, g):
        codes, *packed = ctx.saved_tensors
        return g @ nf4_dequantize(codes, unpack_scales(*packed), ctx.shape, g.dtype), None, None, None, None, None


def product_dtype(x):
    """The dtype of matrix products with x: autocast's, which does not reach inside custom functions, or its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class LoRALinear(nn.Linear):
    """A frozen nn.Linear with what learns beside it: W x + b + scale B A dropout(x) (LoRA, arXiv:2106.09685).

    Where W is several matrices in one, each has an A and a B of its own: lora_a (targets, r, in), lora_b (rows of the
    targets, r); parts {name: (rows, whether it has them)}. With quant='nf4' (QLoRA,
    arXiv:2305.14314) there is no `weight` but buffers of 4 bits, which are filled from a state's `weight` as it comes.
    """

    def __init__(self, config, n_in, bias, rows):
        super().__init__(n_in, sum(rows.values()), bias)
        targets = config.lora_parts() if config.lora_rank else set()
        self.parts = {name: (n, name in targets) for name, n in rows.items()}
        self.quant, self.dropout, rank = config.quant, config.lora_dropout, config.lora_rank
        self.learned = [n for n, learns in self.parts.values() if learns]
        self.lora_a = self.lora_b = None
        if self.learned:
            self.scale = config.lora_alpha / (math.sqrt(rank) if config.lora_rs else rank)
            self.lora_a = nn.Parameter(torch.empty(len(self.learned), rank, n_in))
            self.lora_b = nn.Parameter(torch.empty(sum(self.learned), rank))
        if self.quant:
            self.weight, blocks = None, -(-n_in * self.out_features // 64)
            groups = -(-blocks // 256)
            for name, size, dtype in (('codes', blocks * 32, torch.uint8), ('scales', groups * 256, torch.uint8),
                                      ('steps', groups, torch.float32), ('mean', (), torch.float32)):
                self.register_buffer(name, torch.zeros(size, dtype=dtype), persistent=False)

    @torch.no_grad()
    def quantize(self, weight):
        """Takes a matrix (out, in) into the 4 bits."""
        codes, scales = nf4_quantize(weight)
        for mine, given in zip((self.codes, self.scales, self.steps, self.mean), (codes, *pack_scales(scales)),
                               strict=True):
            mine.copy_(given)

    def _load_from_state_dict(self, state, prefix, *args):
        if self.quant and prefix + 'weight' in state:
            self.quantize(state.pop(prefix + 'weight'))
        super()._load_from_state_dict(state, prefix, *args)

    def frozen(self):
        """W (out, in), dequantised to float32 where it has 4 bits."""
        if not self.quant:
            return self.weight
        scales = unpack_scales(self.scales, self.steps, self.mean)
        return nf4_dequantize(self.codes, scales, (self.out_features, self.in_features), torch.float32)

    def expand(self):
        """B of all parts side by side, zero where one would meet another's A: (out, targets * r)."""
        if len(self.parts) == 1:
            return self.lora_b
        learned = iter(self.lora_b.split(self.learned))
        return torch.block_diag(*(next(learned) if learns else self.lora_b.new_zeros(n, 0)
                                  for n, learns in self.parts.values()))

    def merged(self):
        """W + scale B A (out, in), float32."""
        w = self.frozen().float()
        if self.lora_a is None:
            return w
        return torch.addmm(w, self.expand().float(), self.lora_a.flatten(0, 1).float(), alpha=self.scale)

    def forward(self, x):
        if self.quant:
            dtype, shape = product_dtype(x), (self.out_features, self.in_features)
            y = NF4Product.apply(x.to(dtype), shape, self.codes, self.scales, self.steps, self.mean)
            y = y if self.bias is None else y + self.bias.to(dtype)
        else:
            y = F.linear(x, self.weight, self.bias)
        if self.lora_a is None:
            return y
        inner = F.linear(F.dropout(x, self.dropout, self.training), self.lora_a.flatten(0, 1))
        return y + F.linear(inner, self.expand() * self.scale)


def linear(config, n_in, bias, **rows):
    """An nn.Linear of a block that stacks matrices of so many rows by name, ready for what the config adds to it.

    A MoE's router and stacked experts are none: they have no LoRA and keep their bits, and `GPT.freeze` freezes them.
    """
    if config.quant or config.lora_rank and config.lora_parts() & set(rows):
        return LoRALinear(config, n_in, bias, rows)
    return nn.Linear(n_in, sum(rows.values()), bias=bias)


class Adapter(nn.Module):
    """A bottleneck with a residual of its own behind a frozen sublayer (arXiv:1902.00751); `up` starts at zero."""

    def __init__(self, config):
        super().__init__()
        self.down = nn.Parameter(torch.empty(config.adapter_dim, config.n_embd))
        self.down_bias = nn.Parameter(torch.empty(config.adapter_dim))
        self.up = nn.Parameter(torch.empty(config.n_embd, config.adapter_dim))
        self.up_bias = nn.Parameter(torch.empty(config.n_embd))

    def forward(self, x):
        return x + F.linear(F.gelu(F.linear(x, self.down, self.down_bias)), self.up, self.up_bias)


def is_small(name):
    """Whether a tensor of this name belongs to LoRA, an adapter or the score head: it learns where the rest is frozen.
    """
    return '.lora_' in name or '.adapter' in name or name.startswith('score')


# ----------------------------------------------------------------------------------------------------------------------

class Attention(nn.Module):
    """Multi-head, grouped-query or multi-query attention with rotary positions, QK-norm and a KV cache by flag."""

    def __init__(self, config, causal=True, local=False):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.scale = config.attn_scale or 1 / math.sqrt(config.head_dim)
        self.dropout, self.causal, self.local = config.dropout, causal, local
        # queries, keys and values of all heads in one matrix: rows are q heads, then k heads, then v heads
        q, kv = self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        self.qkv = linear(config, config.n_embd, config.bias or config.qkv_bias, q=q, k=kv, v=kv)
        self.proj = linear(config, q, config.bias, proj=config.n_embd)
        self.q_norm = Norm(self.head_dim, config) if config.qk_norm else None
        self.k_norm = Norm(self.head_dim, config) if config.qk_norm else None
        self.watched = None  # a list that takes the weights of each forward, see `GPT.attention_maps`

    def qk_weight(self, qk):
        """The weights of q_norm and k_norm, a row for each head: (n_head + n_kv_head, D), or None."""
        if self.q_norm.weight is None:
            return None
        rows = self.q_norm.weight.expand(self.n_head, -1), self.k_norm.weight.expand(self.n_kv_head, -1)
        return torch.cat(rows).type_as(qk)

    def forward(self, x, rope=None, mask=None, cache=None):
        """rope: cos, sin (…, T, 1, D) or None; where sinks are further away than a window, as local layers see them,
        also cos and sin of the queries that meet them, and which keys are sinks (…, 1, S, 1)."""
        B, T, _ = x.shape
        heads = (self.n_head, self.n_kv_head)
        qkv = self.qkv(x).view(B, T, self.n_head + 2 * self.n_kv_head, self.head_dim)
        qk, v = qkv.split((sum(heads), self.n_kv_head), dim=2)
        if self.q_norm is not None and self.q_norm.rms:
            qk = rms_norm(qk, self.qk_weight(qk), self.q_norm.eps)  # one pass over both
        elif self.q_norm is not None:
            q, k = qk.split(heads, dim=2)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=2)
        q_far = None
        if rope is not None:
            cos, sin, *far = [t if t.dtype == torch.bool else t.type_as(qk) for t in rope]
            if far and self.local:
                q_far = apply_rope(qk[:, :, :self.n_head], *far[:2]).transpose(1, 2)
            if cache is not None and cache.rolling:  # it rotates its keys anew at every step
                qk = torch.cat((apply_rope(qk[:, :, :self.n_head], cos, sin), qk[:, :, self.n_head:]), dim=2)
            else:
                qk = apply_rope(qk, cos, sin)
        q, k, v = (t.transpose(1, 2) for t in (*qk.split(heads, dim=2), v))  # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.update(k, v)
        if q_far is not None:
            q, k, v = far_sinks(q, q_far, k, v, far[2])
        if self.watched is not None:
            self.watched.append(attention_weights(q, k, mask, self.causal, self.scale))
        y = attend(q, k, v, mask, self.causal, self.scale, self.dropout if self.training else 0.0)
        return self.proj(y[..., :self.head_dim].transpose(1, 2).reshape(B, T, self.n_head * self.head_dim))


class CrossAttention(nn.Module):
    """Queries of the decoder, keys and values of the encoder's last layer (arXiv:1706.03762, 3.2.3)."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.scale, self.dropout = config.attn_scale or 1 / math.sqrt(config.head_dim), config.dropout
        q, kv, bias = self.n_head * self.head_dim, self.n_kv_head * self.head_dim, config.bias or config.qkv_bias
        self.q = linear(config, config.n_embd, bias, q=q)
        self.kv = linear(config, config.n_embd, bias, k=kv, v=kv)
        self.proj = linear(config, q, config.bias, proj=config.n_embd)
        self.watched = None

    def forward(self, x, memory, mask=None, cache=None):
        """x (B, T, C), memory (B, S, C), mask (B, 1, 1, S) True where a token of the source is real, or None."""
        B, T, _ = x.shape
        q = self.q(x).view(B, T, self.n_head, self.head_dim).transpose(1, 2)
        kv = cache.source.get(self) if cache is not None else None
        if kv is None:
            kv = self.kv(memory).view(B, -1, 2, self.n_kv_head, self.head_dim).permute(2, 0, 3, 1, 4)
            if cache is not None:
                cache.source[self] = kv  # the source does not change: once per text
        if self.watched is not None:
            self.watched.append(attention_weights(q, kv[0], mask, False, self.scale))
        y = attend(q, *kv, mask, False, self.scale, self.dropout if self.training else 0.0)
        return self.proj(y.transpose(1, 2).reshape(B, T, self.n_head * self.head_dim))


def activate(kind, up, gate=None):
    """What stands between an MLP's matrices: GELU, SwiGLU (arXiv:2002.05202) or squared ReLU (arXiv:2109.08668)."""
    if kind == 'swiglu':
        return F.silu(gate) * up
    if kind == 'relu2':
        return F.relu(up).square()
    return F.gelu(up, approximate='tanh' if kind == 'gelu_tanh' else 'none')


class MLP(nn.Module):
    """The feed-forward half of a block."""

    def __init__(self, config, dim):
        super().__init__()
        self.kind = config.mlp
        self.gate = linear(config, config.n_embd, config.bias, gate=dim) if self.kind == 'swiglu' else None
        self.up = linear(config, config.n_embd, config.bias, up=dim)
        self.down = linear(config, dim, config.bias, down=config.n_embd)

    def forward(self, x):
        up, gate = self.up(x), None
        if self.gate is not None:
            gate = self.gate(x)
        elif self.kind == 'swiglu':  # packed: both in one product
            gate, up = up.chunk(2, -1)
        return self.down(activate(self.kind, up, gate))


class MoE(nn.Module):
    """A mixture of experts: a router sends each token to the n_expert_active of n_expert MLPs that it weighs most.

    No expert has a capacity, so no token is dropped: tokens are sorted by expert, and each expert's are one slice of a
    grouped matrix product. After a forward in training, `load` (E,) holds the tokens of each expert, `entropy` that of
    the router's distribution, in nats, and `aux` the weighted sum of the load-balancing loss (arXiv:2101.03961, eq. 4)
    and the router's z-loss (arXiv:2202.08906, eq. 5).
    """

    def __init__(self, config):
        super().__init__()
        E, M, C = config.n_expert, config.expert_dim, config.n_embd
        self.kind, self.n_active, self.renorm = config.mlp, config.n_expert_active, config.router_renorm
        self.aux_coef, self.z_coef, self.bias_rate = config.router_aux, config.router_z, config.router_bias_rate
        self.router = nn.Linear(C, E, bias=False)
        self.gate = nn.Parameter(torch.empty(E, M, C)) if self.kind == 'swiglu' else None
        self.up = nn.Parameter(torch.empty(E, M, C))
        self.down = nn.Parameter(torch.empty(E, C, M))
        self.shared = MLP(config, config.n_expert_shared * M) if config.n_expert_shared else None
        if self.bias_rate:  # added where experts are chosen, not to their weights (arXiv:2408.15664)
            self.register_buffer('choice_bias', torch.zeros(E))
        self.load = self.entropy = self.aux = None

    def forward(self, x):
        flat, kind = x.flatten(0, -2), x.device.type
        N, E, K = len(flat), len(self.up), self.n_active
        with torch.autocast(kind, enabled=False):  # a choice between near equals wants all digits
            logits = F.linear(flat.float(), self.router.weight.float())
        probs = logits.softmax(-1)
        if self.bias_rate:
            chosen = (probs + self.choice_bias).topk(K).indices
            weights = probs.gather(1, chosen)
        else:
            weights, chosen = probs.topk(K)
        if self.renorm:
            weights = weights / weights.sum(-1, keepdim=True)
        load = torch.zeros(E, device=x.device).scatter_add_(0, chosen.flatten(), weights.new_ones(N * K))
        if self.training:
            logprobs = logits.log_softmax(-1)
            balance = E * (load / (N * K) * probs.mean(0)).sum()
            self.aux = self.aux_coef * balance + self.z_coef * logits.logsumexp(-1).square().mean()
            self.load, self.entropy = load, -(probs * logprobs).sum(-1).mean().detach()

        dtype = product_dtype(x)
        order = chosen.flatten().argsort(stable=True)  # by expert
        token, rows = order // K, flat.to(dtype)
        # A CPU's kernels are made anew for every number of rows, so slices there are padded to multiples of 32.
        step = 32 if kind == 'cpu' and N * K >= 64 * E else 1
        ends = (-(-load // step) * step).cumsum(0).int()
        if step > 1:
            sizes = torch.cat((ends[:1], ends.diff()))
            place = torch.arange(N * K) + ((ends - sizes) - (load.cumsum(0) - load)).long()[chosen.flatten()[order]]
            ends[-1] = size = -(-(N * K + (step - 1) * E) // step) * step
            rows = rows.new_zeros(size, rows.shape[1]).index_copy(0, place, rows.index_select(0, token))
        else:
            rows = rows.index_select(0, token)

        def product(a, w):  # slice e of a (rows, in) times w[e] (out, in)
            return F.grouped_mm(a, w.to(dtype).transpose(1, 2), offs=ends)
        gate = product(rows, self.gate) if self.gate is not None else None
        rows = product(activate(self.kind, product(rows, self.up), gate), self.down)
        rows = rows.index_select(0, place) if step > 1 else rows
        rows = rows * weights.flatten().index_select(0, order)[:, None].to(dtype)
        y = torch.zeros(N, x.shape[-1], dtype=dtype, device=x.device).index_add(0, token, rows).view(x.shape)
        return y if self.shared is None else y + self.shared(x)


class Block(nn.Module):
    """Attention, then MLP, each with its residual; the norm stands before the sublayer or after the addition.

    A decoder's block of a model with an encoder attends to that in between.
    """

    def __init__(self, config, layer, encoder=False):
        super().__init__()
        self.post = config.norm_place == 'post'
        self.norm1 = Norm(config.n_embd, config)
        self.attn = Attention(config, config.causal and not encoder, not encoder and config.is_local(layer))
        crossing = config.n_encoder_layer and not encoder
        self.norm_cross = Norm(config.n_embd, config) if crossing else None
        self.cross = CrossAttention(config) if crossing else None
        self.norm2 = Norm(config.n_embd, config)
        self.mlp = MoE(config) if config.is_sparse(layer) and not encoder else MLP(config, config.mlp_dim)
        self.drop = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.adapter1, self.adapter2 = (Adapter(config) if config.adapter_dim else nn.Identity() for _ in range(2))
        self.recompute = False  # activation checkpointing (arXiv:1604.06174): the backward pass computes it all again

    def forward(self, x, rope=None, masks=(None, None), cache=None, memory=None, memory_mask=None):
        args = x, rope, masks[self.attn.local], cache, memory, memory_mask
        if cache is not None:  # never compiled, should `sublayers` be: a cache grows at every step
            return Block.sublayers(self, *args)
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(self.sublayers, *args, use_reentrant=False)
        return self.sublayers(*args)

    def sublayers(self, x, rope, mask, cache, memory, memory_mask):
        if self.post:
            x = self.norm1(x + self.adapter1(self.drop(self.attn(x, rope, mask, cache))))
            if self.cross is not None:
                x = self.norm_cross(x + self.drop(self.cross(x, memory, memory_mask, cache)))
            return self.norm2(x + self.adapter2(self.drop(self.mlp(x))))
        x = x + self.adapter1(self.drop(self.attn(self.norm1(x), rope, mask, cache)))
        if self.cross is not None:
            x = x + self.drop(self.cross(self.norm_cross(x), memory, memory_mask, cache))
        return x + self.adapter2(self.drop(self.mlp(self.norm2(x))))


# ----------------------------------------------------------------------------------------------------------------------
# the loss, without ever holding all logits in float32

def chunk_rows(vocab_size, device_type):
    """Rows of logits held at a time: 4 MB in a CPU's cache, 256 MB on a GPU, but enough for an efficient product."""
    return max(256, (1 << 20 if device_type == 'cpu' else 1 << 26) // vocab_size)


def _softcap(logits, cap):
    return cap * torch.tanh(logits / cap) if cap else logits


class LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of h @ w.T against targets, a chunk of rows at a time, so that (N, V) never exists.

    The gradient of a softmax needs only the logits, so for a summed loss it is taken in the same pass over the chunks;
    a per-token loss has a gradient of its own for each token, so there the chunk is computed again in the backward.
    """

    @staticmethod
    def forward(ctx, h, w, targets, cap, temperature, per_token, learning, details=False):
        """h (N, C), w (V, C), targets (N,) with -100 to skip -> the sum of the losses; with per_token, losses and, with
        details too, the entropies of the distributions (N,) float32, else None.

        cap: of the logits, 0 = none; these are then divided by the temperature. learning: whether a backward may
        follow.
        """
        losses = torch.zeros(len(h), dtype=torch.float32, device=h.device)
        entropies = torch.zeros_like(losses) if details else None
        ones = losses.new_ones(len(h))
        grads = (ones, None) if learning and not per_token else None
        ctx.how = cap, temperature
        dh, dw = LinearCrossEntropy.walk(h, w, targets, *ctx.how, grads, (losses, entropies), ctx.needs_input_grad[1])
        ctx.per_token = per_token
        if not torch.compiler.is_compiling():  # which cannot say that nothing was learnt from the entropies
            ctx.set_materialize_grads(False)
        ctx.save_for_backward(*((h, w, targets) if per_token else (dh, dw)))
        return (losses, entropies) if per_token else losses.sum()

    @staticmethod
    def backward(ctx, g, g_entropy=None):
        if ctx.per_token:
            h, w, targets = ctx.saved_tensors
            g = torch.zeros_like(g_entropy) if g is None else g
            dh, dw = LinearCrossEntropy.walk(h, w, targets, *ctx.how, (g, g_entropy), None, ctx.needs_input_grad[1])
        else:
            dh, dw = ctx.saved_tensors
            dh, dw = dh * g, dw if dw is None else dw * g
        return dh, dw if dw is None else dw.to(dh.dtype), None, None, None, None, None, None

    @staticmethod
    def walk(h, w, targets, cap, temperature, g, out, learns):
        """Fills out, losses and entropies (N,) or None, where given; returns gradients for h, and w if it learns, where
        g is: what losses and entropies (N,) or None are multiplied by in the sum whose gradient it is.
        """
        def rule(logits, rows):
            logits = logits / temperature if temperature != 1 else logits
            valid, tc = targets[rows] != -100, targets[rows].clamp(min=0)[:, None]
            logprobs = logits.sub_(logits.logsumexp(1, keepdim=True))
            if out is not None:
                out[0][rows] = -logprobs.gather(1, tc)[:, 0] * valid
                if out[1] is not None:
                    out[1][rows] = -(logprobs.exp() * logprobs).sum(1) * valid
            if g is None:
                return None
            weights = (g[0][rows] * valid)[:, None]
            if g[1] is None:
                d = logprobs.exp_().mul_(weights)
            else:  # of an entropy H: -p (log p + H)
                p = logprobs.exp()
                d = logprobs.sub_((p * logprobs).sum(1, keepdim=True)).mul_(p)
                d = d.mul_(-(g[1][rows] * valid)[:, None]).add_(p.mul_(weights))
            d.scatter_add_(1, tc, -weights)  # softmax - onehot
            return d / temperature if temperature != 1 else d
        return walk_logits(h, w, cap, rule, g is not None, learns)


class LinearLoss(torch.autograd.Function):
    """The sum of any loss of the logits h @ w.T over rows, a chunk of them at a time, so that (N, V) never exists."""

    @staticmethod
    def forward(ctx, h, w, cap, rule, learning, *given):
        """h (N, C), w (V, C) -> the sum of the losses, and what the rule tells of each row, (N, m) float32.

        rule(logits (n, V) float32, learning, *rows of given (n, …)) -> (losses (n,), told (n, m), the derivative of
        their sum by the logits (n, V), or None without learning); it may write over the logits.
        """
        losses, tables = [], []

        def chunk(logits, rows):
            loss, told, d = rule(logits, learning, *(x[rows] for x in given))
            losses.append(loss.sum())
            tables.append(told)
            return d
        ctx.save_for_backward(*walk_logits(h, w, cap, chunk, learning, ctx.needs_input_grad[1]))
        ctx.n_given, table = len(given), torch.cat(tables)
        ctx.mark_non_differentiable(table)
        return torch.stack(losses).sum(), table

    @staticmethod
    def backward(ctx, g, _):
        dh, dw = ctx.saved_tensors
        return dh * g, None if dw is None else (dw * g).to(dh.dtype), None, None, None, *[None] * ctx.n_given


def walk_logits(h, w, cap, rule, learning, learns):
    """Calls rule(logits (n, V) float32, slice of the rows) over h (N, C) @ w.T (C, V), soft-capped, a chunk of rows at
    a time. learning: it gives the derivative of some sum by the logits -> that by h and, if w learns, w; else None.
    """
    dh = torch.empty_like(h) if learning else None
    dw = torch.zeros_like(w, dtype=torch.float32) if learning and learns else None
    w = w.to(h.dtype)
    size = chunk_rows(len(w), h.device.type)
    for i in range(0, len(h), size):
        rows = slice(i, i + size)
        logits = _softcap((h[rows] @ w.T).float(), cap)
        slope = 1 - (logits / cap).square() if cap and learning else None  # derivative of the soft-cap
        d = rule(logits, rows)
        if learning:
            d = (d * slope if cap else d).to(h.dtype)
            dh[rows] = d @ w
            if learns:
                dw += d.T @ h[rows]
    return dh, dw


def real_first(idx, mask, *others):
    """Moves the real tokens of each row to its front, in their order: ids and bool (B, T), None = all are real.

    Positions then count real tokens alone, and causality hides the padding. others (B, T) move alike.
    """
    if mask is None:
        return idx, torch.ones_like(idx, dtype=torch.bool), *others
    order = mask.logical_not().int().argsort(dim=1, stable=True)
    return tuple(x.gather(1, order) for x in (idx, mask, *others))


def pooled(x, mask, how):
    """Hidden states (B, T, C) -> (B, C): the 'mean' over those that mask (B, T) has, or the 'last' of them."""
    if how not in ('mean', 'last'):
        raise ValueError(f"how={how!r} is not one of 'mean', 'last'")
    if how == 'last':
        last = (mask * torch.arange(x.shape[1], device=x.device)).argmax(1)
        return x[torch.arange(len(x), device=x.device), last]
    return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


# ----------------------------------------------------------------------------------------------------------------------
# optimizers

# ----------------------------------------------------------------------------------------------------------------------
# generation

class KVCache:
    """Keys and values of every layer, preallocated: kv (n_layer, 2, B, n_kv_head, capacity, head_dim).

    `lengths` counts the tokens stored for each row. Row b's token number t stands in slot t whatever the other rows do,
    so ragged rows need no left padding and positions are simply 0, 1, 2, … in each. `source` holds the keys and values
    of an encoder's output by CrossAttention.
    """
    rolling = False

    def __init__(self, config, batch, capacity, device, dtype):
        self.config, self.source = config, {}
        self.kv = torch.zeros(config.n_layer, 2, batch, config.n_kv_head, capacity, config.head_dim,
                              device=device, dtype=dtype)
        self.lengths = [0] * batch

    def begin(self, T, counts=None):
        """Before a forward over T new tokens per row -> (positions, masks of global and local layers, far, is_sink).

        None where the default is right. counts: how many of the T are no padding, per row. far: positions of the
        queries as sinks see them, and is_sink (S,), where some sink is further away than the window.
        """
        config, before = self.config, self.lengths
        self.layer, self.T, self.end = 0, T, max(before) + T
        self.uniform = min(before) == max(before)
        self.lengths = [n + c for n, c in zip(before, counts or [T] * len(before), strict=True)]
        device, far, is_sink = self.kv.device, None, None
        slides = config.window and self.end > config.window
        if self.end == T and not slides:
            return None, (None, None), None, None  # an empty cache: positions 0 … T-1 and the plain causal pattern
        self.positions = torch.tensor(before, device=device)[:, None] + torch.arange(T, device=device)
        keys = torch.arange(self.end, device=device)
        mask = local = None  # one new token per row sees everything
        if T > 1 or not self.uniform:
            mask = local = (keys <= self.positions[..., None])[:, None]
        if slides:
            local = windowed(self.positions, keys, config)[:, None]
            local = local if mask is None else local & mask
        if config.n_sink and self.end > config.n_sink + config.window:
            far, is_sink = self.positions.clamp(max=config.n_sink + config.window - 1), keys < config.n_sink
        return self.positions, (mask, local), far, is_sink

    def update(self, k, v):
        """Stores k and v (B, H, T, D) of the next layer; returns all keys and values (B, H, S, D) stored so far."""
        k_cache, v_cache = self.kv[self.layer]
        self.layer += 1
        if self.uniform:
            k_cache[:, :, self.end - self.T:self.end], v_cache[:, :, self.end - self.T:self.end] = k, v
        else:
            rows = torch.arange(len(k), device=k.device)[:, None]
            k_cache[rows, :, self.positions], v_cache[rows, :, self.positions] = k.transpose(1, 2), v.transpose(1, 2)
        return k_cache[:, :, :self.end], v_cache[:, :, :self.end]

    def select(self, rows):
        """Keeps these rows (indices; one may be named several times, to share a prompt among samples)."""
        self.kv = self.kv[:, :, rows]
        self.source = {layer: kv[:, rows] for layer, kv in self.source.items()}
        self.lengths = [self.lengths[r] for r in rows]


class RollingCache(KVCache):
    """A ring of the last `window` tokens after the n_sink first, for a text without end in constant memory and time.

    Only for models whose layers are all local. Slot t holds token t up to n_sink; token t behind that stands in slot
    n_sink + (t - n_sink) % window. Keys are stored before their rotation: at every step they are rotated to where they
    stand within the cache, so positions stay small however long the text (arXiv:2309.17453, 3.2).
    """
    rolling = True
    rope = None  # cos and sin (rows, 1, slots, D) at `key_positions`, of a model that has them

    def __init__(self, config, batch, device, dtype):
        super().__init__(config, batch, config.n_sink + config.window, device, dtype)

    def tokens(self, lengths):
        """Which token each slot holds after so many: (rows, 1) -> (rows, slots), -1 for none."""
        slots, sinks = torch.arange(self.kv.shape[4], device=lengths.device), self.config.n_sink
        last = lengths - 1 - (lengths - 1 - slots) % self.config.window
        held = torch.where(slots < sinks, slots, last)
        return torch.where((held < lengths) & ((held >= sinks) | (slots < sinks)), held, -1)

    def begin(self, T, counts=None):
        config, device, before = self.config, self.kv.device, self.lengths
        self.layer, self.T = 0, T
        self.lengths = [n + c for n, c in zip(before, counts or [T] * len(before), strict=True)]
        same = min(before) == max(before) and min(self.lengths) == max(self.lengths)
        old, new = (torch.tensor(n[:1] if same else n, device=device)[:, None] for n in (before, self.lengths))
        queries = old + torch.arange(T, device=device)
        held, after, size = self.tokens(old), self.tokens(new), self.kv.shape[4]
        # where the content of each slot comes from: itself, or new token number i, which follows the slots
        self.origin = torch.where(after == held, torch.arange(size, device=device), size + after - old)
        self.slot = (after == old).int().argmax(1) if T == 1 else None  # where a single new token goes
        keys = after if T == 1 else torch.cat((held, queries), dim=1)
        mask = ((keys[:, None] <= queries[..., None]) & (keys >= 0)[:, None]
                & ((queries[..., None] - keys[:, None] < config.window) | (keys < config.n_sink)[:, None]))[:, None]
        # positions count from a token before which nothing but sinks is visible any more
        farthest = config.n_sink + config.window - 1
        base = (old - farthest).clamp(min=0)
        self.key_positions = torch.where(keys < config.n_sink, keys, keys - base).clamp(min=0)
        far = is_sink = None
        if config.n_sink and T > 1 and max(before) + T > farthest + 1:
            far, is_sink = queries.clamp(max=farthest), keys < config.n_sink
        positions = queries - base if config.pos == 'rope' else queries
        return positions, (None, mask), far, is_sink

    def update(self, k, v):
        kv = self.kv[self.layer]
        if self.T == 1 and len(self.slot) == 1:
            kv[0, :, :, self.slot[0]], kv[1, :, :, self.slot[0]] = k[:, :, 0], v[:, :, 0]
            k, v = kv
        elif self.T == 1:
            rows = torch.arange(len(k), device=k.device)
            kv[0, rows, :, self.slot], kv[1, rows, :, self.slot] = k[:, :, 0], v[:, :, 0]
            k, v = kv
        else:
            both = torch.cat((kv, torch.stack((k, v))), dim=3)
            index = self.origin[:, None, :, None].expand(k.shape[0], k.shape[1], -1, k.shape[3])
            self.kv[self.layer] = both.gather(3, index.expand(2, *index.shape))
            k, v = both
        self.layer += 1
        if self.rope is not None:
            k = apply_rope(k, *(t.type_as(k) for t in self.rope))
        return k, v


def has_fp16_kernels():
    """Whether this PyTorch can multiply float32 by weights that it keeps in float16 (FBGEMM: x86)."""
    return 'fbgemm' in torch.backends.quantized.supported_engines


class PackedLinear(nn.Module):
    """One or several nn.Linear over the same input that can do nothing but multiply, faster: on a CPU, for generation,
    see `GPT.pack`.

    quant '': the weights lie in the order in which oneDNN's kernels read them. 'fp16': in float16, which changes no
    number by more than 1/2048, half as many bytes to read; products and sums are float32. 'int8': rounded to 8 bits
    with a scale per output channel; the kernel reads bfloat16 and adds up in float32.
    """

    def __init__(self, *linears, quant=''):
        super().__init__()
        weight = torch.cat([linear.weight.detach() for linear in linears])
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        self.quant, self.scale = quant, None
        if quant == 'int8':
            self.scale = (weight.float().abs().amax(1) / 127).clamp(min=1e-12).bfloat16()
            weight = (weight.float() / self.scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        elif quant == 'fp16':
            weight = torch.ops.quantized.linear_prepack_fp16(weight, self.bias)
        else:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, 16)  # for about so many rows of input
        self.packed = weight

    def forward(self, x):
        if self.quant == 'fp16':
            return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)
        if not self.quant:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, 'none', [], '')
        rows = x.flatten(0, -2)
        if len(rows) > 16:  # the kernel of int8 is made for few
            return F.linear(x, self.packed.to(x.dtype) * self.scale[:, None], self.bias)
        y = torch._weight_int8pack_mm(rows.bfloat16(), self.packed, self.scale).to(x.dtype).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def filter_logits(logits, top_k=0, top_p=1.0, min_p=0.0):
    """Sets logits (B, V) outside the top k, the nucleus (arXiv:1904.09751) or min-p (arXiv:2407.01082) to -inf."""
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        outside = probs.cumsum(-1) - probs >= top_p  # the mass before a token already suffices; the first always stays
        outside[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), -math.inf)
    if min_p:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), -math.inf)
    return logits


# ----------------------------------------------------------------------------------------------------------------------

class GPT(nn.Module):
    """The model of a GPTConfig: a trunk of blocks between an embedding and a head; see the top of this file."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        dtype = torch.bfloat16 if config.quant else None
        self.tok_emb = nn.Embedding(config.vocab_size, config.n_embd, dtype=dtype)
        self.pos_emb = nn.Embedding(config.block_size, config.n_embd, dtype=dtype) if config.pos == 'learned' else None
        self.drop = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.encoder = self.encoder_norm = None
        if config.n_encoder_layer:
            self.encoder = nn.ModuleList(Block(config, i, encoder=True) for i in range(config.n_encoder_layer))
            self.encoder_norm = Norm(config.n_embd, config) if config.norm_place == 'pre' else None
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = Norm(config.n_embd, config) if config.norm_place == 'pre' else None
        self.head = self.score = self.score_gain = None
        if config.score_head:
            self.score = nn.Linear(config.n_embd, 1)
            self.score_gain = nn.Parameter(torch.empty(1)) if config.score_likelihood else None
            self.register_buffer('score_scale', torch.tensor([1.0, 0.0]))  # gain and bias of `rewards`
        if not config.score_head or config.score_likelihood:
            self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False, dtype=dtype)
        if self.head is not None and config.tie_weights:
            self.head.weight = self.tok_emb.weight
        if config.pos == 'rope':  # a table, not weights: made anew at loading
            for name, table in zip(('rope_cos', 'rope_sin'), rope_tables(config), strict=True):
                self.register_buffer(name, table, persistent=False)
        self.sparse = [block.mlp for block in self.blocks if isinstance(block.mlp, MoE)]
        self.router_stats, self.block_masks = None, {}
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """GPT-2's normal initialisation: projections into the residual stream shrink with depth, or start at zero.

        The rest is drawn as if there were no LoRA and no adapters, and these afterwards, so that they change nothing.
        Matrices in 4 bits stay zero: they come with a state.
        """
        config = self.config
        if self.tok_emb.weight.is_meta:
            return  # there is nothing to fill: the weights come with a state

        def fill(name, p):
            into_residual = name.endswith(('proj.weight', 'down.weight', 'mlp.down'))
            if p.ndim < 2:
                p.fill_(1.0 if name.endswith('weight') else 0.0)
            elif config.zero_init and (into_residual or name == 'head.weight'):
                p.zero_()
            else:
                std = config.init_std or (1.0 if name.endswith('emb.weight') else p.shape[-1] ** -0.5)
                p.normal_(0.0, std / math.sqrt(2 * config.n_layer) if into_residual else std)

        for name, p in self.named_parameters():
            if not is_small(name):
                fill(name, p)
        for name, p in self.named_parameters():
            if name == 'score.weight':
                p.normal_(0.0, (config.n_embd + 1) ** -0.5)  # its bias is zero: arXiv:1909.08593's
            elif name == 'score_gain':
                p.fill_(0.1)  # DPO's usual beta
            elif name.endswith('lora_a'):
                p.uniform_(-p.shape[-1] ** -0.5, p.shape[-1] ** -0.5)  # as PEFT draws it
            elif is_small(name) and name.endswith('.down'):
                fill(name, p)
            elif is_small(name):
                p.zero_()

    def embed(self, idx, positions=None):
        """Ids (B, T) -> (B, T, C) with positions added, those of 'rope' apart; positions: (T,) or (B, T), None = 0 …"""
        config, T = self.config, idx.shape[1]
        x = self.tok_emb(idx)
        x = x.float() if config.quant else x  # the residual stream has all digits
        if config.pos == 'learned':
            x = x + (self.pos_emb.weight[:T] if positions is None else self.pos_emb(positions))
        elif config.pos == 'sinusoidal':
            at = torch.arange(T, device=idx.device) if positions is None else positions
            x = x * math.sqrt(config.n_embd) + sinusoidal(at, config.n_embd).type_as(x)
        return self.drop(x)

    def rope(self, positions):
        """cos and sin at positions (…, T), for every head the same: (…, T, 1, D) each."""
        return [table[positions].unsqueeze(-2) for table in (self.rope_cos, self.rope_sin)]

    def encode(self, source, source_mask=None):
        """The encoder: ids (B, S), bool (B, S) True where a token is real -> (B, S, C)."""
        if source.shape[1] > self.config.block_size:
            raise ValueError(f'{source.shape[1]} tokens do not fit into block_size={self.config.block_size}')
        x, mask = self.embed(source), None if source_mask is None else source_mask[:, None, None]
        rope = self.rope(slice(source.shape[1])) if self.config.pos == 'rope' else None
        for block in self.encoder:
            x = block(x, rope, (mask, mask))
        return self.encoder_norm(x) if self.encoder_norm is not None else x

    def hidden(self, idx, positions=None, mask=None, cache=None, counts=None, memory=None, memory_mask=None):
        """The trunk: ids (B, T) -> hidden states (B, T, C), after the final norm.

        positions (B, T) or (T,): where each token stands, by default 0 … T-1 (after what the cache holds).
        mask (…, T, S) bool, broadcast over heads as (B, 1, T, S): True where a query may see a key; combined with
        causality and the window. cache: a KVCache that is read and extended, by counts (a list) of the T tokens of
        each row. memory (B, S, C) and memory_mask (B, S): what `encode` gave, and what of it is real.
        """
        config, T = self.config, idx.shape[1]
        if T > config.block_size:
            raise ValueError(f'{T} tokens do not fit into block_size={config.block_size}')
        far = is_sink = None
        if cache is not None:
            positions, masks, far, is_sink = cache.begin(T, counts)
        else:
            masks, far, is_sink = self.masks(T, positions, mask, idx.device)
        rope = None
        if config.pos == 'rope':
            rope = self.rope(slice(T) if positions is None else positions)
            if far is not None:
                rope += [*self.rope(far), is_sink[..., None, :, None]]
            if cache is not None and cache.rolling:
                cache.rope = [table[cache.key_positions][:, None] for table in (self.rope_cos, self.rope_sin)]
        x = self.embed(idx, positions)
        memory_mask = None if memory_mask is None else memory_mask[:, None, None]
        for block in self.blocks:
            x = block(x, rope, masks, cache, memory, memory_mask)
        return self.norm(x) if self.norm is not None else x

    def masks(self, T, positions, mask, device):
        """Without a cache -> (masks of global and local layers, far, is_sink), as `KVCache.begin` gives them."""
        config, far, is_sink = self.config, None, None
        if mask is not None and config.causal:
            mask = mask & torch.ones(T, T, dtype=torch.bool, device=device).tril()
        if not config.window or T <= config.window and positions is None:
            return (mask, mask), None, None
        at = torch.arange(T, device=device) if positions is None else positions
        farthest = config.n_sink + config.window - 1
        if config.n_sink and (T > farthest + 1 or positions is not None):
            far, is_sink = at.clamp(max=farthest), at < config.n_sink
        if mask is None and positions is None and device.type == 'cuda' and not (config.dropout and self.training):
            return (None, self.block_mask(T, device)), far, is_sink
        local = windowed(at, at, config) & torch.ones(T, T, dtype=torch.bool, device=device).tril()
        local = local[:, None] if local.ndim == 3 else local
        return (mask, local if mask is None else local & mask), far, is_sink

    def block_mask(self, T, device):
        """The window's pattern for flex_attention, which skips what nobody sees instead of masking it."""
        if T not in self.block_masks:
            from torch.nn.attention.flex_attention import create_block_mask  # here, for it takes a second to import
            window, n_sink = self.config.window, self.config.n_sink
            self.block_masks[T] = create_block_mask(
                lambda b, h, q, k: (q >= k) & ((q - k < window) | (k < n_sink)), None, None, T, T, device=device)
        return self.block_masks[T]

    @torch.no_grad()
    def attention_maps(self, ids, source=None):
        """What each head of each layer looks at in one text, a list of ids -> [(name, (H, T, S) float32)], row t the
        weights of token t's query. source: ids that an encoder reads; its own maps come first, then, layer by layer,
        what the decoder sees of itself and of the source."""
        modules = [(name.replace('blocks', 'layer').replace('attn', 'self'), module)
                   for name, module in self.named_modules() if isinstance(module, (Attention, CrossAttention))]
        for _, module in modules:
            module.watched = []
        try:
            idx = torch.tensor([ids], device=self.tok_emb.weight.device)
            memory = None if source is None else self.encode(torch.tensor([source], device=idx.device))
            self.hidden(idx, mask=torch.ones(1, 1, len(ids), len(ids), dtype=torch.bool, device=idx.device),
                        memory=memory)
            return [(name, module.watched[0][0]) for name, module in modules if module.watched]
        finally:
            for _, module in modules:
                module.watched = None

    def pool(self, idx, mask=None, how='mean'):
        """One vector per text: ids (B, T), bool (B, T) True where a token is real, None = all are -> (B, C).

        how: 'mean' over the real tokens, or 'last', the last real one's. What an encoder (causal=False) is asked for;
        a decoder's last token knows all others too. Padding may stand anywhere: it changes nothing.
        """
        if self.encoder is not None:
            raise ValueError(f'n_encoder_layer={len(self.encoder)}: of an encoder-decoder take the mean over `encode`')
        idx, mask = real_first(idx, mask)
        return pooled(self.hidden(idx, mask=None if self.config.causal else mask[:, None, None]), mask, how)

    def scores(self, idx, real=None, answer=None):
        """What a reward model makes of texts: ids (B, T), bool (B, T) True where a token is real, None = all are, and
        bool (B, T) True on the tokens of the answer, None = all -> (B,) float32. Padding may stand anywhere.

        A linear function of one vector per text, see `pool`. With score_likelihood plus the answer's log-probability
        times a gain that is learnt: what DPO takes for a reward (arXiv:2305.18290), its reference being part of the
        rest. A small model knows by its likelihood that a number is wrong long before a score has learnt it.
        """
        idx, real, answer = real_first(idx, real, answer if answer is not None else torch.ones_like(idx).bool())
        x = self.hidden(idx, mask=None if self.config.causal else real[:, None, None])
        with torch.autocast(idx.device.type, enabled=False):  # differences of scores want all digits
            vector = pooled(x, real, self.config.score_head).float()
            scores = F.linear(vector, self.score.weight.float(), self.score.bias.float())[:, 0]
        if self.score_gain is None:
            return scores
        targets = idx.roll(-1, 1).masked_fill(~(answer & real).roll(-1, 1), -100)
        targets[:, -1] = -100
        return scores - self.score_gain.float() * self.cross_entropy(x, targets, 'none').sum(1)

    def values(self, idx, answer):
        """Of a causal reward model, what it makes of each text up to each of its tokens: ids (B, T), right-padded, bool
        (B, T) True on the answer's tokens -> (B, T) float32, on the scale of `rewards`: a critic that knows much.
        """
        x, config = self.hidden(idx), self.config
        with torch.autocast(idx.device.type, enabled=False):
            vectors = x.float()
            if config.score_head == 'mean':
                vectors = vectors.cumsum(1) / torch.arange(1, idx.shape[1] + 1, device=idx.device)[:, None]
            scores = F.linear(vectors, self.score.weight.float(), self.score.bias.float())[..., 0]
        if self.score_gain is not None:
            targets = idx.roll(-1, 1).masked_fill(~answer.roll(-1, 1), -100)
            targets[:, -1] = -100
            losses = self.cross_entropy(x, targets, 'none').cumsum(1)
            scores = scores - self.score_gain.float() * F.pad(losses, (1, 0))[:, :-1]
        gain, bias = self.score_scale
        return gain * scores + bias

    def rewards(self, idx, real=None, answer=None):
        """Scores (B,) as `scores` gives them, times the gain and plus the bias of `score_scale`: what makes those of
        held-out answers have mean 0 and variance 1, once these have been measured (arXiv:1909.08593)."""
        gain, bias = self.score_scale
        return gain * self(idx, real=real, answer=answer) + bias

    def logits(self, hidden):
        """Hidden states (…, C) -> float32 logits (…, V)."""
        if self.config.quant:
            dtype = product_dtype(hidden)
            return _softcap(F.linear(hidden.to(dtype), self.head.weight.to(dtype)).float(), self.config.logit_softcap)
        return _softcap(self.head(hidden).float(), self.config.logit_softcap)

    def forward(self, idx, targets=None, positions=None, mask=None, reduction='mean', source=None, source_mask=None,
                segments=None, real=None, answer=None, temperature=1.0, rule=None, given=()):
        """ids (B, T) -> logits (B, T, V); with targets (B, T) -> cross-entropy in nats. With a score_head: `scores`.

        Targets of -100 do not count; with reduction='hidden' none are needed: it gives hidden states (B, T, C). Others
        are 'mean' over the targets that count, 'sum', 'none' for (B, T), or 'details' for (losses (B, T), entropies of
        the distributions (B, T), hidden states (B, T, C)), with logits divided by the temperature: what learning from a
        policy's own samples takes. Of a reward model 'values' gives `values` instead of `scores`.
        source (B, S), source_mask (B, S): see `encode`. segments (B, T) of integers: a token sees those of its own
        only, so that several texts share a row, each with positions of its own. In training the gradient of 'mean' is
        also that of the routers' losses; the value is not.
        rule, given: another loss, see `LinearLoss`; given begins with the places (N,) in the flattened (B * T,) that it
        is taken at -> (the mean, with the gradient of 'mean', what it tells of each place).
        """
        if (source is None) != (self.encoder is None):
            raise ValueError('a source goes with a model that has n_encoder_layer, and with no other')
        if self.score is not None:
            return self.scores(idx, real, answer) if reduction != 'values' else self.values(idx, answer)
        if segments is not None:
            if source is not None:
                raise ValueError('segments of a row cannot share a source: give each text a row')
            same = (segments[:, :, None] == segments[:, None, :])[:, None]  # (B, 1, T, T)
            mask = same if mask is None else mask & same
        memory = self.encode(source, source_mask) if source is not None else None
        hidden = self.hidden(idx, positions, mask, memory=memory, memory_mask=source_mask)
        if reduction == 'hidden':
            return hidden
        if targets is None and rule is None:
            return self.logits(hidden)
        if rule is not None:
            loss_of = self.loss_of
            if torch.compiler.is_compiling():  # it would be compiled anew for every number of places
                loss_of = torch.compiler.disable(loss_of)
            losses, told = loss_of(hidden, rule, *given)
            losses, reduction = losses / len(told), 'mean'
        else:
            losses = self.cross_entropy(hidden, targets, reduction, temperature)
        if self.sparse and self.training:
            stats = torch.stack([torch.cat((moe.load, (moe.entropy * moe.load.sum())[None])) for moe in self.sparse])
            self.router_stats = stats if self.router_stats is None else self.router_stats + stats
            if reduction == 'mean':
                aux = sum(moe.aux for moe in self.sparse)
                losses = losses + (aux - aux.detach())
        if rule is not None:
            return losses, told
        return (*losses, hidden) if reduction == 'details' else losses

    def loss_of(self, hidden, rule, places, *given):
        """Hidden states (B, T, C) -> the sum of the losses by a rule at these places of (B * T,), and what it tells."""
        h, w, learning = self.products(hidden.flatten(0, 1)[places])
        return LinearLoss.apply(h, w, self.config.logit_softcap, rule, learning, *given)

    def products(self, h):
        """What a chunked loss multiplies: hidden states (N, C) and the head's matrix, in the dtype of products, and
        whether a backward may follow."""
        w, dtype = self.head.weight, product_dtype(h)
        h, w = h.to(dtype), w if self.config.quant else w.to(dtype)
        return h, w, torch.is_grad_enabled() and (h.requires_grad or w.requires_grad)

    def cross_entropy(self, hidden, targets, reduction='mean', temperature=1.0):
        """Hidden states (B, T, C) and targets (B, T) -> the loss of `forward`; with 'details', losses and entropies."""
        h, flat, device_type = hidden.flatten(0, 1), targets.flatten(), hidden.device.type
        if device_type == 'cpu' and not torch.compiler.is_compiling():  # a GPU would have to wait for the number
            kept = (flat != -100).nonzero()[:, 0]
            # a multiple of 64: kernels are made anew for every number of rows
            padded = F.pad(kept, (0, -len(kept) % 64))
            if 0 < len(padded) < len(flat):
                chosen = flat[padded].index_fill(0, torch.arange(len(kept), len(padded)), -100)
                found = self.cross_entropy_of(h[padded], chosen, reduction, temperature)
                if reduction in ('mean', 'sum'):
                    return found

                def back(values):
                    return values.new_zeros(len(flat)).index_copy(0, kept, values[:len(kept)]).view_as(targets)
                return tuple(map(back, found)) if reduction == 'details' else back(found)
        found = self.cross_entropy_of(h, flat, reduction, temperature)
        if reduction == 'details':
            return tuple(values.view_as(targets) for values in found)
        return found.view_as(targets) if reduction == 'none' else found

    def cross_entropy_of(self, h, targets, reduction, temperature):
        """`cross_entropy` over rows: hidden states (N, C) and targets (N,) -> the loss, or losses (N,)."""
        device_type, per_token = h.device.type, reduction in ('none', 'details')
        if len(h) <= chunk_rows(self.config.vocab_size, device_type) or isinstance(self.head, PackedLinear):
            logits = self.logits(h) if temperature == 1 else self.logits(h) / temperature
            if reduction != 'details':
                return F.cross_entropy(logits, targets, ignore_index=-100, reduction=reduction)
            logprobs = logits.log_softmax(-1)
            entropies = -(logprobs.exp() * logprobs).sum(-1) * (targets != -100)
            return F.nll_loss(logprobs, targets, ignore_index=-100, reduction='none'), entropies
        h, w, learning = self.products(h)
        cap = self.config.logit_softcap
        losses = LinearCrossEntropy.apply(h, w, targets, cap, temperature, per_token, learning, reduction == 'details')
        if reduction == 'mean':
            return losses / (targets != -100).sum()
        return losses[0] if reduction == 'none' else losses

    def routed(self):
        """What routers did since the last call: tokens per expert, and entropies times tokens: (n_sparse, E + 1)."""
        stats, self.router_stats = self.router_stats, None
        return stats

    @torch.no_grad()
    def balance(self, load):
        """After a step: experts with less than their share of the load (n_sparse, E) of all processes are chosen more
        often from now on, by router_bias_rate (arXiv:2408.15664, algorithm 1)."""
        for moe, counts in zip(self.sparse, load, strict=True) if self.config.router_bias_rate else ():
            moe.choice_bias += moe.bias_rate * (counts.mean() - counts).sign()

    # ------------------------------------------------------------------------------------------------------------------

    @classmethod
    def from_state(cls, state, **overrides):
        """A model from a checkpoint's dict: 'model_args' (fields of GPTConfig, overridden where given) and 'model'.

        Raises ValueError with one sentence for an unknown field and for a missing, extra or misshapen tensor; but LoRA,
        adapters and a score head that the state's own fields do not have start afresh, and a model that has no other
        head leaves that out. With quant='nf4' the state has the matrices whole, and the model takes each into its 4
        bits as it comes.
        """
        unknown = set(state['model_args']) - set(GPTConfig.__dataclass_fields__)
        if unknown:
            raise ValueError(f'model_args has {sorted(unknown)[0]!r}, which this version does not know')
        model, args = cls(GPTConfig(**state['model_args'] | overrides)), state['model_args']
        own, given = model.state_dict(), state['model']
        if model.head is None:
            given = {name: tensor for name, tensor in given.items() if name != 'head.weight'}
        for name, module in model.named_modules():
            if isinstance(module, LoRALinear) and module.quant:
                own[f'{name}.weight'] = torch.empty(module.out_features, module.in_features, device='meta')
        for name in [*own, *given]:
            field = ('lora_rank' if '.lora_' in name else 'score_likelihood' if name == 'score_gain' else
                     'score_head' if name.startswith('score') else 'adapter_dim')
            fresh = is_small(name) and not args.get(field)
            if name not in own or name not in given and not fresh:
                raise ValueError(f'tensor {name} is {"missing" if name in own else "not part of this model"}')
            if name in given and own[name].shape != given[name].shape:
                raise ValueError(f'tensor {name} has shape {tuple(given[name].shape)} where this model has '
                                 f'{tuple(own[name].shape)}')
        model.load_state_dict(given, strict=False)
        return model

    def freeze(self):
        """Where the config has LoRA or adapters, nothing but these, and a score head, learns from now on; returns the
        model."""
        for name, p in self.named_parameters() if self.config.lora_rank or self.config.adapter_dim else ():
            p.requires_grad_(is_small(name))
        return self

    def small_state(self):
        """The tensors of LoRA, adapters and a score head by name: all that a run keeps which froze the rest."""
        return {name: tensor for name, tensor in self.state_dict().items() if is_small(name)}

    @torch.no_grad()
    def merged(self, dtype=torch.float32):
        """A new GPT without LoRA and 4 bits that computes the same: W + scale B A in dtype. Adapters stay as they are.

        Computed in float32, one matrix at a time.
        """
        plain = {f.name: f.default for f in fields(GPTConfig) if f.name == 'quant' or f.name.startswith('lora_')}
        with on_meta():
            model = GPT(replace(self.config, **plain))
        own, weights = dict(self.named_parameters(remove_duplicate=False)) | dict(self.named_buffers()), {}
        for name in model.state_dict():
            module = self.get_submodule(name.rpartition('.')[0])
            folds = isinstance(module, LoRALinear) and name.endswith('.weight')
            if name != 'head.weight' or not self.config.tie_weights:
                weights[name] = (module.merged() if folds else own[name]).detach().to(dtype, copy=not folds)
        model.load_state_dict(weights, strict=False, assign=True)
        if self.config.tie_weights and model.head is not None:
            model.head.weight = model.tok_emb.weight
        for name in ('rope_cos', 'rope_sin') if self.config.pos == 'rope' else ():
            model.register_buffer(name, own[name].clone(), persistent=False)
        return model.train(self.training)

    def memory(self):
        """Bytes of the weights as they are kept; a head tied to the embedding counts once."""
        kept = [b for name, b in self.named_buffers() if not name.startswith('rope_')]
        return sum(t.nbytes for t in (*self.parameters(), *kept))

    @torch.no_grad()
    def pack(self, quant=''):
        """Makes this model faster at generation and unfit for anything else; returns it. Changes nothing on a GPU.

        quant: '' keeps the numbers; 'fp16' keeps float32 weights in float16; 'int8' rounds each matrix to int8 with a
        scale per output channel. Both need a CPU. ValueError where that cannot be.
        """
        weight = self.tok_emb.weight
        if self.config.lora_rank or self.config.quant:
            name = 'lora_rank' if self.config.lora_rank else 'quant'
            raise ValueError(f'{name}={getattr(self.config, name)!r}: fold it in first, with model.merged()')
        fitting = {'': (weight.dtype,), 'fp16': (torch.float32,), 'int8': (torch.float32, torch.bfloat16)}
        if quant not in fitting:
            raise ValueError(f"quant={quant!r} is not one of '', 'fp16', 'int8'")
        if quant and weight.device.type != 'cpu':
            raise ValueError(f'quant={quant!r} needs device=cpu, not {weight.device}')
        if weight.dtype not in fitting[quant]:
            names = ' or '.join(str(dtype).removeprefix('torch.') for dtype in fitting[quant])
            raise ValueError(f'quant={quant!r} needs dtype={names}, not {str(weight.dtype).removeprefix("torch.")}')
        if quant == 'fp16' and not has_fp16_kernels():
            raise ValueError("quant='fp16' needs a PyTorch with FBGEMM, which this processor's has not: leave it out")
        kernels = torch.backends.mkldnn.is_available() and (
            weight.dtype == torch.float32
            or weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        self.n_params = self.num_params()
        for module in list(self.modules()) if weight.device.type == 'cpu' and (quant or kernels) else ():
            if isinstance(module, MLP) and module.gate is not None:  # one product of both
                module.gate, module.up = None, PackedLinear(module.gate, module.up, quant=quant)
            for name, child in module.named_children():
                if isinstance(child, nn.Linear) and name not in ('router', 'score'):
                    setattr(module, name, PackedLinear(child, quant=quant))
        return self.requires_grad_(False)

    def num_params(self, learning=False):
        """Number of parameters, or of those that learn; a head tied to the embedding counts once."""
        if isinstance(self.head, PackedLinear):
            return self.n_params
        if learning:
            return sum(p.numel() for p in self.parameters() if p.requires_grad)
        return sum(p.numel() for p in self.parameters()) + self._in_4_bits()

    def _in_4_bits(self):
        """How many numbers have 4 bits."""
        return sum(m.in_features * m.out_features for m in self.modules() if isinstance(m, LoRALinear) and m.quant)

    def flops_per_token(self, T):
        """Multiply-adds x 2, forward and backward, per token at context T: 6 N + 12 L H D T (arXiv:2204.02311, B).

        A frozen matrix has no gradient of its own: 4 instead of 6. With an encoder: per token of a target beside a
        source as long.
        """
        c = self.config
        share = c.n_expert_active / max(1, c.n_expert)  # of the experts, a token meets
        matrices = [(p, p.numel() * (share if p.ndim == 3 and not is_small(n) else 1))
                    for n, p in self.named_parameters() if n.startswith(('blocks.', 'encoder.')) and p.ndim > 1]
        matrices += [(self.head.weight, self.head.weight.numel())] if self.head is not None else []
        matmul = sum(n * (6 if p.requires_grad else 4) for p, n in matrices) + 4 * self._in_4_bits()
        layers = c.n_layer + (c.n_layer + c.n_encoder_layer if c.n_encoder_layer else 0)  # of attention
        return matmul + 12 * layers * c.n_head * c.head_dim * T

    @torch.inference_mode()
    def next_logits(self, contexts, cache=None, memory=None, memory_mask=None):
        """Ragged contexts (lists of ids) -> float32 logits (B, V) of the token after each; fills an empty cache.

        A context longer than block_size needs a RollingCache: it is read a block at a time.
        """
        lengths, block = [len(c) for c in contexts], self.config.block_size
        idx = torch.zeros(len(contexts), max(lengths), dtype=torch.long)
        for row, context in zip(idx, contexts, strict=True):
            row[:len(context)] = torch.tensor(context)
        device, hidden = self.tok_emb.weight.device, None
        for part in idx.to(device).split(block if cache is not None and cache.rolling else max(lengths), dim=1):
            counts = [min(n, part.shape[1]) for n in lengths]
            lengths = [n - c for n, c in zip(lengths, counts, strict=True)]
            # right padding: causality already hides it
            x = self.hidden(part, cache=cache, counts=counts, memory=memory, memory_mask=memory_mask)
            here = torch.tensor(counts, device=device)
            last = x[torch.arange(len(x), device=device), (here - 1).clamp(min=0)]
            hidden = last if hidden is None else torch.where(here[:, None] > 0, last, hidden)
        return self.logits(hidden)

    @torch.inference_mode()
    def stream(self, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0,
               stop_ids=(), num_samples=1, seed=None, vocab_limit=0, use_cache=True, sources=None, force=None):
        """As `generate`, token by token: yields (rows, ids, logprobs), three lists over the rows still unfinished."""
        check_prompts(prompts, self.config, sources)
        if num_samples < 1 or max_new_tokens < 0:
            raise ValueError('num_samples starts at 1 and max_new_tokens at 0')
        if temperature < 0 or top_k < 0 or not 0 < top_p <= 1 or not 0 <= min_p <= 1 or repetition_penalty <= 0:
            raise ValueError('sampling needs temperature >= 0, top_k >= 0, 0 < top_p <= 1, 0 <= min_p <= 1 and '
                             'repetition_penalty > 0')
        longest = max(map(len, prompts), default=0) + max_new_tokens
        if self.config.window and self.config.pos == 'learned' and longest > self.config.block_size:
            raise ValueError(f'{longest} tokens of prompt and answer: with window={self.config.window} and '
                             f"pos='learned' a text ends at block_size={self.config.block_size}")
        if isinstance(seed, list) and len(seed) != len(prompts):
            raise ValueError(f'{len(seed)} seeds for {len(prompts)} prompts: give one for each, or one number')
        was_training = self.training
        self.eval()  # dropout must not reach a sample
        try:
            yield from self._stream([list(p) for p in prompts for _ in range(num_samples)], num_samples, max_new_tokens,
                                    set(stop_ids), seed, use_cache, sources, force,
                                    (vocab_limit, temperature, top_k, top_p, min_p, repetition_penalty))
        finally:
            self.train(was_training)

    def _stream(self, texts, shared, max_new_tokens, stop_ids, seed, use_cache, sources, force, sampling):
        """The loop of `stream` over texts (lists of ids, which grow); `shared` neighbours have the same prompt."""
        config, device = self.config, self.tok_emb.weight.device
        dtype = torch.float32 if config.quant else self.tok_emb.weight.dtype
        block, n_rows = config.block_size, len(texts)
        uniform = uniforms(seed, n_rows // shared, shared, max_new_tokens).to(device)
        begins, forced = list(map(len, texts)), [[] for _ in texts]
        longest = max(map(len, texts), default=0) + max_new_tokens
        rolls = (use_cache and all(config.is_local(i) for i in range(config.n_layer))
                 and block >= config.n_sink + config.window < longest)
        memory = memory_mask = None
        if sources is not None:
            lengths = torch.tensor([len(source) for source in sources])
            memory_mask = (torch.arange(lengths.max()) < lengths[:, None]).to(device)
            ids = torch.zeros(memory_mask.shape, dtype=torch.long)
            for row, source in zip(ids, sources, strict=True):
                row[:len(source)] = torch.tensor(source)
            memory = self.encode(ids.to(device), memory_mask)

        def seen(rows, again):  # of the sources
            of = torch.tensor([r // shared for r in rows], device=device)
            return {'memory': memory[of] if again else None, 'memory_mask': memory_mask[of]}
        start = [0 if rolls else max(0, len(t) - block) for t in texts]  # where each row's visible context begins
        rows, done, cache = list(range(n_rows)), set(), None  # done: finished rows that are still in the batch
        for step in range(max_new_tokens):
            full = cache is not None and not rolls and max(cache.lengths) == block
            if done and (cache is None or full or 4 * len(done) >= len(rows)):
                # finished rows leave the batch, a quarter of it at a time: what is kept of a cache has to be copied
                keep = [i for i, r in enumerate(rows) if r not in done]
                rows = [rows[i] for i in keep]
                done.clear()
                if cache is not None:
                    cache.select(keep)
            if cache is None or not rolls and max(cache.lengths) == block:
                # Beginning, or the context is full: keep its last three quarters and read them afresh, as in training,
                # where every window begins at position 0. One pass over 3/4 T buys T/4 tokens.
                for r in rows:
                    if not rolls and len(texts[r]) - start[r] > block:
                        start[r] = len(texts[r]) - max(1, block * 3 // 4)
                repeat = shared if step == 0 else 1  # at first the samples of a prompt share one pass over it
                contexts = [texts[r][start[r]:] for r in rows[::repeat]]
                if rolls:
                    cache = RollingCache(config, len(contexts), device, dtype)
                elif use_cache:
                    capacity = min(block, max(map(len, contexts)) + max_new_tokens - step)
                    cache = KVCache(config, len(contexts), capacity, device, dtype)
                logits = self.next_logits(contexts, cache, **(seen(rows[::repeat], True) if sources else {}))
                if repeat > 1:
                    copies = [i for i in range(len(contexts)) for _ in range(repeat)]
                    logits = logits[copies]
                    if cache is not None:
                        cache.select(copies)
            else:
                last = torch.tensor([[texts[r][-1]] for r in rows], device=device)
                x = self.hidden(last, cache=cache, **(seen(rows, False) if sources else {}))
                logits = self.logits(x[:, -1])
            drawn = sample(logits, [texts[r] for r in rows], uniform[step, rows], *sampling)
            alive = [(r, *of) for r, *of in zip(rows, *drawn, strict=True) if r not in done]
            for i, (r, token, _) in enumerate(alive):
                if forced[r]:
                    token = forced[r].pop(0)
                    alive[i] = r, token, math.nan
                texts[r].append(token)
                if force is not None and not forced[r]:
                    forced[r] = list(force(texts[r][begins[r]:]))
                if token in stop_ids:
                    done.add(r)
            yield tuple(map(list, zip(*alive, strict=True)))
            if len(done) == len(rows):
                break

    def generate(self, prompts, max_new_tokens, return_logprobs=False, **options):
        """Continues ragged prompts (lists of ids) -> a list of lists of new ids, prompt i's samples at i*num_samples ….

        temperature 0 is greedy. top_k, top_p, min_p: see `filter_logits`. repetition_penalty (arXiv:1909.05858) divides
        the positive and multiplies the negative logits of tokens already in the row. A row ends after a token of
        stop_ids, which is its last id. num_samples continuations per prompt share one pass over it. seed makes it
        repeatable, row by row: what is drawn for a prompt depends on no other one, and with a list of seeds, one each,
        not on its place either. vocab_limit: ids from here on (padding of the vocabulary) are never drawn. With
        return_logprobs also the log-probability of each new id under softmax(logits / temperature), before any filter
        or penalty. force(new ids of a row so far) gives ids that the row goes on with, whatever the model would say;
        their log-probability is nan. sources: for each prompt the ids that an encoder reads. A text longer than
        block_size is continued from its last part, without end if all layers have a window (a prompt longer than a
        table of learned positions raises ValueError, as do an empty prompt and ids outside the vocabulary).
        """
        out = [[] for _ in range(len(prompts) * options.get('num_samples', 1))]
        logs = [[] for _ in out]
        for rows, ids, logprobs in self.stream(prompts, max_new_tokens, **options):
            for r, token, logprob in zip(rows, ids, logprobs, strict=True):
                out[r].append(token)
                logs[r].append(logprob)
        return (out, logs) if return_logprobs else out


def check_prompts(prompts, config, sources=None):
    """Raises ValueError with one sentence for prompts, and sources for an encoder, that this model cannot continue."""
    if config.score_head:
        raise ValueError(f'a model with score_head={config.score_head!r} scores texts: it cannot generate')
    if not config.causal:
        raise ValueError('a model with causal=False is an encoder: it cannot generate')
    if (sources is None) == (config.n_encoder_layer > 0) or sources is not None and len(sources) != len(prompts):
        raise ValueError('a model with n_encoder_layer needs a source for each prompt, any other none')
    for what, texts in (('prompt', prompts), ('source', sources or ())):
        for i, text in enumerate(texts):
            if not len(text):
                raise ValueError(f'{what} {i} is empty: give at least one token')
            if min(text) < 0 or max(text) >= config.vocab_size:
                bad = next(t for t in text if not 0 <= t < config.vocab_size)
                raise ValueError(f'{what} {i}: token id {bad} is outside the vocabulary of {config.vocab_size}')
            if len(text) > config.block_size and (config.pos == 'learned' or what == 'source'):
                limit = 'the learned positions end' if config.pos == 'learned' else 'a source ends'
                raise ValueError(f'{what} {i} has {len(text)} tokens and {limit} at block_size={config.block_size}: '
                                 'shorten it')


def uniforms(seed, n_prompts, num_samples, steps):
    """Numbers in [0, 1) to draw with, (steps, n_prompts * num_samples) float32; seed: None, one, or one per prompt."""
    if not isinstance(seed, list):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        seed = torch.randint(1 << 62, (n_prompts,), generator=generator).tolist()
    parts = [torch.rand(steps, num_samples, generator=torch.Generator().manual_seed(s)) for s in seed]
    return torch.cat(parts, 1) if parts else torch.zeros(steps, 0)


def sample(logits, texts, u, vocab_limit, temperature, top_k, top_p, min_p, repetition_penalty):
    """Draws a token per row from logits (B, V) with uniform numbers u (B,): returns ids and their log-probabilities."""
    logprobs = F.log_softmax(logits / (temperature or 1.0), dim=-1)
    logits = logits[:, :vocab_limit] if vocab_limit else logits
    if repetition_penalty != 1:
        for row, text in zip(logits, texts, strict=True):
            seen = torch.tensor(sorted(set(text)), device=logits.device)
            row[seen] = torch.where(row[seen] > 0, row[seen] / repetition_penalty, row[seen] * repetition_penalty)
    if temperature == 0:
        ids = logits.argmax(-1)
    else:
        cdf = filter_logits(logits / temperature, top_k, top_p, min_p).softmax(-1).cumsum(-1)
        # the first token whose cumulative probability exceeds u; scaled, because a float sum may miss 1
        ids = torch.searchsorted(cdf, (u[:, None] * cdf[:, -1:]), right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return ids.tolist(), logprobs.gather(1, ids[:, None])[:, 0].tolist()


# ----------------------------------------------------------------------------------------------------------------------
# a lesson: python model.py

WORDS, ROWS = ('the', 'cat', 'sat'), ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0))  # three tokens, two numbers each


def pencil():
    """An Attention of one head whose numbers a pencil can follow: queries and keys are the tokens' own numbers, values
    are twelve times these. Scores are multiplied by ln 2, so that the softmax of 0, 1, 2 is 1, 2, 4 in proportion."""
    attention = Attention(GPTConfig(n_layer=1, n_head=1, n_embd=2, block_size=3, vocab_size=3, bias=False,
                                    attn_scale=math.log(2)))
    one = torch.eye(2)
    attention.qkv.weight.data.copy_(torch.cat((one, one, 12 * one)))
    attention.proj.weight.data.copy_(one)
    return attention


@torch.no_grad()
def attention_by_hand(attention, x):
    """Self-attention of one causal head (arXiv:1706.03762, 3.2.1) step by step: x (T, C) -> {name: matrix}, each the
    next line of the lesson; the last is what the module itself gives."""
    T, D = len(x), attention.head_dim
    q, k, v = (x @ w.T for w in attention.qkv.weight.split(D))
    scores = q @ k.T  # (T, T): row i is what token i looks for in each token
    hidden = torch.ones(T, T).triu(1).bool()  # what comes later
    masked = (attention.scale * scores).masked_fill(hidden, -math.inf)
    weights = masked.softmax(-1)
    return {'x': x, 'Q': q, 'K': k, 'V': v, 'Q K^T': scores, 'scaled, masked': masked, 'softmax': weights,
            'softmax V': weights @ v, 'output': (weights @ v) @ attention.proj.weight.T}


def anatomy(config):
    """What a model consists of, without making it -> rows (part, how many of it, parameters of all of them), and the
    model on the meta device."""
    with on_meta():
        model = GPT(config)
    parts = {}
    names = {'tok_emb': 'token embedding', 'pos_emb': 'positions', 'head': 'head', 'attn': 'attention',
             'cross': 'cross-attention', 'mlp': 'MLP', 'experts': 'experts', 'score': 'score'}
    seen = set()
    for name, p in model.named_parameters(remove_duplicate=False):
        block = name.split('.')[0] in ('blocks', 'encoder')
        part = name.split('.')[2 if block else 0]
        if part == 'mlp' and name.startswith('blocks') and config.is_sparse(int(name.split('.')[1])):
            part = 'experts'
        part = 'LoRA and adapters' if is_small(name) and 'score' not in name else names.get(part, 'norms')
        owners, count = parts.setdefault(part, (set(), 0))
        owners.add('.'.join(name.split('.')[:3 if block else 1]))
        parts[part] = owners, count + (0 if id(p) in seen else p.numel())
        seen.add(id(p))
    in_4_bits = model._in_4_bits()
    rows = [(part, len(owners), count) for part, (owners, count) in parts.items()]
    return rows + ([('frozen matrices in 4 bits', 1, in_4_bits)] if in_4_bits else []), model


def lesson():
    """Prints the worked example of attention."""
    def number(x):
        return 'hidden' if x == -math.inf else f'{x:.4f}'.rstrip('0').rstrip('.')
    attention, x = pencil(), torch.tensor(ROWS)
    says = {'x': 'three tokens, a row each', 'Q': 'what each looks for (W_q = 1)', 'K': 'what each offers (W_k = 1)',
            'V': 'what each tells (W_v = 12)', 'Q K^T': 'how well they match: row i looks, column j offers',
            'scaled, masked': 'times ln 2 here (1 / sqrt(D) is usual); nobody sees what comes later',
            'softmax': 'shares: 2^0 : 2^1 : 2^2 = 1 : 2 : 4', 'softmax V': 'each takes its shares of what others tell',
            'output': 'projected (W_o = 1): what Attention in this file gives'}
    print('Self-attention, one head, three tokens of two numbers (arXiv:1706.03762)')
    for name, matrix in attention_by_hand(attention, x).items():
        print(f'\n{name}: {says[name]}')
        for word, row in zip(WORDS, matrix.tolist(), strict=True):
            print(f'  {word}  ' + ' '.join(f'{number(value):>8}' for value in row))
    same = torch.allclose(attention(x[None])[0], attention_by_hand(attention, x)['output'], atol=1e-6)
    print(f'\nmodel.Attention gives {"the same" if same else "SOMETHING ELSE"}.')


def table(config):
    """Prints what a model of a config consists of, computes and keeps in memory."""
    rows, model = anatomy(config)
    total, T = model.num_params(), config.block_size
    print(f'\n{"part":<28}{"how many":>9}{"parameters":>15}{"share":>8}')
    for part, count, numbers in rows:
        print(f'{part:<28}{count:>9}' + (f'{numbers:>15,}{numbers / total:>8.1%}' if numbers else ' (the embedding)'))
    print(f'{"all":<28}{"":>9}{total:>15,}\n')
    learn = model.freeze().num_params(learning=True)
    flops, cache = model.flops_per_token(T), 2 * config.n_layer * config.n_kv_head * config.head_dim
    kept = min(T, config.window + config.n_sink) if config.window and 'G' not in config.window_pattern else T
    for what, value in (
            ('vocabulary, context', f'{config.vocab_size:,} tokens, {T:,} tokens'),
            ('a token forward and backward', f'{flops / 1e6:,.1f} MFLOP at the whole context'),
            ('a trillion FLOP/s, all used', f'{1e12 / flops:,.0f} tokens/s'),
            ('weights', f'{model.memory() / 1e6:,.1f} MB as they are trained, {total * 2 / 1e6:,.1f} MB in 16 bits'),
            ('gradients, moments of AdamW', f'{learn * 4 / 1e6:,.1f} MB, {learn * 8 / 1e6:,.1f} MB'),
            ('KV cache in 16 bits', f'{cache * 2:,} bytes a token, {cache * 2e-6 * kept:,.1f} MB for {kept:,}')):
        print(f'{what:<31}{value}')


if __name__ == '__main__':
    from pathlib import Path

    import runtime  # for the command line alone: everything above needs torch and nothing else

    def main():
        here = Path(__file__).parent
        stages = [here / f'{name}.py' for name in ('train', 'sft', 'reward', 'dpo', 'ppo', 'grpo', 'distill')]
        _, given = runtime.configure(globals(), GPTConfig, *(stage for stage in stages if stage.exists()))
        args = {key: value for key, value in given.items() if key in GPTConfig.__dataclass_fields__}
        with runtime.user_errors():
            config = GPTConfig(**args)
        if not given:
            lesson()
        table(config)
        if given and 'vocab_size' not in args:
            print('A run takes the vocabulary of its data instead: --vocab_size=N')
    runtime.cli(main)
