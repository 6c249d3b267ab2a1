"""
A few new weights that learn beside a model whose own are frozen: LoRA, DoRA, adapters, and the frozen matrices in 4
bits (QLoRA). All of it is applied to a finished model.

    model = GPT(config)
    lora.apply(model, LoRAConfig(lora_rank=8, quant='nf4'))      its own weights are frozen, the new ones learn
    torch.save(lora.state(model), …)                             the new ones alone
    plain = lora.merge(model)                                    W + scale B A: a GPT as any other

Papers: adapters (arXiv:1902.00751), LoRA (arXiv:2106.09685), rsLoRA (arXiv:2312.03732), DoRA (arXiv:2402.09353), QLoRA
(arXiv:2305.14314).
"""
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import GPT, on_meta, product_dtype

TARGETS = ('q', 'k', 'v', 'proj', 'attn_gate', 'q_a', 'kv_a', 'kv_b', 'gate', 'up', 'down')


@dataclass
class LoRAConfig:
    """What is applied to a model; by default nothing. Raises ValueError with one sentence for an impossible value."""
    lora_rank: int = 0  # rank of the updates that LoRA learns beside the blocks' frozen matrices; 0 = none
    lora_alpha: float = 16.0  # the updates are multiplied by lora_alpha / lora_rank
    lora_dropout: float = 0.0  # on what the updates read
    lora_targets: str = ','.join(TARGETS)  # matrices that get an update; names the model lacks are ignored
    lora_rs: bool = False  # lora_alpha / sqrt(lora_rank) instead (rsLoRA)
    lora_dora: bool = False  # each row of an updated matrix also learns its length, apart from its direction (DoRA)
    adapter_dim: int = 0  # width of the bottleneck that adapters learn behind each frozen sublayer; 0 = none
    lora_rows_from: int = 0  # first id whose rows of embedding and head learn, too: of tokens that were added; 0 = none
    quant: str = ''  # 'nf4': the blocks' frozen matrices in 4 bits, embeddings and head in bfloat16 (QLoRA)

    def __post_init__(self):
        for name in ('lora_rank', 'lora_alpha', 'adapter_dim', 'lora_rows_from'):
            if getattr(self, name) < 0:
                raise ValueError(f'{name}={getattr(self, name)} must not be negative')
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f'lora_dropout={self.lora_dropout} must be in [0, 1)')
        if self.quant not in ('', 'nf4'):
            raise ValueError(f"quant={self.quant!r} is not one of '', 'nf4'")
        if unknown := sorted(self.targets - set(TARGETS)):
            raise ValueError(f'lora_targets={self.lora_targets!r}: {unknown[0]!r} is not one of {", ".join(TARGETS)}')
        if self.quant and not self.learns:
            raise ValueError(f'quant={self.quant!r} freezes the matrices: without lora_rank or adapter_dim nothing '
                             'could be trained')

    @property
    def targets(self):
        """The names in lora_targets, a set."""
        return {name.strip() for name in self.lora_targets.split(',')} - {''}

    @property
    def learns(self):
        """Whether anything is applied."""
        return self.lora_rank > 0 or self.adapter_dim > 0


# ----------------------------------------------------------------------------------------------------------------------
# on a model

def config_of(model):
    """The LoRAConfig that was applied to a model, or one of nothing."""
    return getattr(model, 'lora', None) or LoRAConfig()


def apply(model, config):
    """Adds to a GPT what a LoRAConfig says, and freezes its own weights; returns the model, changed.

    The new weights change nothing at first: B and the adapters' second matrix are zero, DoRA's magnitudes the lengths
    of rows as they are. A MoE's router and stacked experts have no LoRA and keep their bits. ValueError where the model
    has none of the targets.
    """
    if not config.learns:
        return model
    model.requires_grad_(False)
    if config_of(model).learns:
        raise ValueError('this model has LoRA or adapters already: fold them in first, with lora.merge(model)')
    found = False
    for module in list(model.modules()):
        matrices = [(name, part) for name, part in module.named_children() if isinstance(part, nn.Linear)]
        for name, matrix in matrices if hasattr(module, 'stacked') else ():
            rows = module.stacked.get(name, {name: matrix.out_features})
            found = found or bool(config.targets & set(rows))
            if config.quant or config.lora_rank and config.targets & set(rows):
                setattr(module, name, LoRALinear(matrix, rows, config))
    if config.lora_rank and not found:
        raise ValueError(f'lora_targets={config.lora_targets!r}: this model has none of them')
    if config.adapter_dim:
        for block in (*(model.encoder or ()), *model.blocks):
            block.adapter1, block.adapter2 = (Adapter(model.config.n_embd, config.adapter_dim) for _ in range(2))
    if config.quant:
        embeddings_to_bf16(model)
    if config.lora_rows_from:
        learn_rows(model, config.lora_rows_from)
    model.lora = config
    if not model.tok_emb.weight.is_meta:
        init_weights(model)
    return model


def learn_rows(model, first):
    """Lets the rows of embedding and head of ids >= first learn."""
    model.tok_emb = embedding = RowsEmbedding(model.tok_emb, first)
    if model.head is not None:  # a reward model's has none
        model.head = RowsHead(model.head, first, embedding if model.config.tie_weights else None)


@torch.no_grad()
def init_weights(model):
    """A as PEFT draws it, the adapters' first matrix as the model's own are drawn; all else zero but magnitudes."""
    for name, p in model.named_parameters():
        if name.endswith('lora_a'):
            p.uniform_(-p.shape[-1] ** -0.5, p.shape[-1] ** -0.5)
        elif is_new(name) and name.endswith('.down'):
            p.normal_(0.0, model.config.init_std or p.shape[-1] ** -0.5)
        elif is_new(name) and not name.endswith('lora_magnitude'):
            p.zero_()


def is_new(name):
    """Whether a tensor of this name belongs to LoRA or an adapter."""
    return '.lora_' in name or '.adapter' in name


def state(model):
    """The tensors of LoRA and adapters by name: all that a run has to keep whose base is elsewhere."""
    return {name: tensor for name, tensor in model.state_dict().items() if is_new(name)}


@torch.no_grad()
def merge(model, dtype=torch.float32):
    """A new GPT that computes the same without LoRA and 4 bits, its weights copies in dtype, see `LoRALinear.merged`.

    Computed in float32, one matrix at a time. Adapters stay beside it: they are no part of a matrix.
    """
    config = config_of(model)
    with on_meta():
        plain = GPT(model.config)
        plain.head = plain.head if model.head is not None else None
        apply(plain, LoRAConfig(adapter_dim=config.adapter_dim))
    own, weights = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers()), {}
    for name in plain.state_dict():
        module = model.get_submodule(name.rpartition('.')[0])
        folds = isinstance(module, (LoRALinear, RowsEmbedding, RowsHead)) and name.endswith('.weight')
        if name != 'head.weight' or not model.config.tie_weights:
            kept = torch.float32 if name.endswith('choice_bias') else dtype
            weights[name] = (module.merged() if folds else own[name]).detach().to(kept, copy=not folds)
    return plain.assign(weights).train(model.training)


class LoRALinear(nn.Linear):
    """A frozen nn.Linear with what learns beside it: W x + b + scale B A dropout(x) (LoRA, arXiv:2106.09685).

    Where W is several matrices in one, each has an A and a B of its own: lora_a (targets, r, in), lora_b (rows of the
    targets, r); parts {target: (rows, whether it has them)}. With lora_dora, lora_magnitude (rows of the targets,) is
    the length of each row of W + scale B A (DoRA, arXiv:2402.09353). With quant='nf4' (QLoRA, arXiv:2305.14314) there
    is no `weight` but buffers of 4 bits.
    """

    def __init__(self, linear, rows, config):
        with on_meta():
            super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.weight, self.bias = linear.weight, linear.bias
        targets, rank = config.targets if config.lora_rank else set(), config.lora_rank
        device = linear.weight.device
        self.parts = {name: (n, name in targets) for name, n in rows.items()}
        self.quant, self.dropout = config.quant, config.lora_dropout
        self.learned = [n for n, learns in self.parts.values() if learns]
        self.lora_a = self.lora_b = self.lora_magnitude = None
        if self.learned:
            self.scale = config.lora_alpha / (math.sqrt(rank) if config.lora_rs else rank)
            self.lora_a = nn.Parameter(torch.empty(len(self.learned), rank, linear.in_features, device=device))
            self.lora_b = nn.Parameter(torch.empty(sum(self.learned), rank, device=device))
        if self.quant:
            self.weight = None
            codes, scales = nf4_quantize(linear.weight.detach())
            for name, tensor in zip(('codes', 'scales', 'steps', 'mean'), (codes, *pack_scales(scales)), strict=True):
                self.register_buffer(name, tensor, persistent=False)
        if self.learned and config.lora_dora:
            self.lora_magnitude = nn.Parameter(torch.cat(
                [part for part, learns in self.by_part(self.frozen().detach().float().norm(dim=1)) if learns]))

    def frozen(self):
        """W (out, in), dequantised to float32 where it has 4 bits."""
        if not self.quant:
            return self.weight
        scales = unpack_scales(self.scales, self.steps, self.mean)
        return nf4_dequantize(self.codes, scales, (self.out_features, self.in_features), torch.float32)

    def by_part(self, rows):
        """Numbers of rows (out,) -> (those of a part, whether it has LoRA) of each part."""
        return zip(rows.split([n for n, _ in self.parts.values()]), (learns for _, learns in self.parts.values()),
                   strict=True)

    def expand(self):
        """B of all parts side by side, zero where one would meet another's A: (out, targets * r)."""
        if len(self.parts) == 1:
            return self.lora_b
        learned = iter(self.lora_b.split(self.learned))
        return torch.block_diag(*(next(learned) if learns else self.lora_b.new_zeros(n, 0)
                                  for n, learns in self.parts.values()))

    def direction(self):
        """W + scale B A (out, in), float32."""
        w = self.frozen().float()
        if self.lora_a is None:
            return w
        return torch.addmm(w, self.expand().float(), self.lora_a.flatten(0, 1).float(), alpha=self.scale)

    def magnitudes(self, lengths):
        """Lengths of all rows (out,), those of targets replaced by lora_magnitude."""
        learned = iter(self.lora_magnitude.split(self.learned))
        return torch.cat([next(learned) if learns else part for part, learns in self.by_part(lengths)])

    def gain(self):
        """DoRA's factor on each row, magnitude over length: (out,) float32."""
        with torch.no_grad(), torch.autocast(self.lora_a.device.type, enabled=False):
            # constant to the gradient: section 4.3 of the paper, which spares memory
            lengths = self.direction().norm(dim=1).clamp(min=1e-30)
        return self.magnitudes(lengths) / lengths

    def merged(self):
        """The one matrix (out, in) that does the same, float32: W + scale B A, with DoRA its rows times `gain`."""
        return self.direction() if self.lora_magnitude is None else self.direction() * self.gain()[:, None]

    def forward(self, x):
        bias = self.bias if self.lora_magnitude is None else None  # which DoRA does not scale
        if self.quant:
            dtype, shape = product_dtype(x), (self.out_features, self.in_features)
            y = NF4Product.apply(x.to(dtype), shape, self.codes, self.scales, self.steps, self.mean)
            y = y if bias is None else y + bias.to(dtype)
        else:
            y = F.linear(x, self.weight, bias)
        if self.lora_a is None:
            return y
        inner = F.linear(F.dropout(x, self.dropout, self.training), self.lora_a.flatten(0, 1))
        y = y + F.linear(inner, self.expand() * self.scale)
        if self.lora_magnitude is None:
            return y
        y = (y * self.gain()).to(y.dtype)  # in float32: 16 bits have few numbers near 1
        return y if self.bias is None else y + self.bias.to(y.dtype)


class RowsEmbedding(nn.Embedding):
    """A frozen embedding with lora_rows (V - first, C), which learn and are added to its rows of ids >= first."""

    def __init__(self, embedding, first):
        with on_meta():
            super().__init__(*embedding.weight.shape)
        self.weight, self.first = embedding.weight, first
        self.lora_rows = nn.Parameter(torch.empty(len(self.weight) - first, self.embedding_dim,
                                                  device=self.weight.device))

    def forward(self, idx):
        rows = F.pad(self.lora_rows, (0, 0, 1, 0))  # the first one is zero, of all frozen ids
        return super().forward(idx).to(rows.dtype) + F.embedding((idx - self.first + 1).clamp(min=0), rows)

    def merged(self):
        """The embedding (V, C), float32."""
        return self.weight.float() + F.pad(self.lora_rows.float(), (0, 0, self.first, 0))


class Head(nn.Linear):
    """A head that is computed in the dtype of the products around it."""

    def forward(self, x):
        dtype = product_dtype(x)
        return F.linear(x.to(dtype), self.weight.to(dtype))


class RowsHead(Head):
    """As RowsEmbedding, a frozen head; of one that is tied to an embedding the rows are those of that."""

    def __init__(self, head, first, embedding=None):
        with on_meta():
            super().__init__(head.in_features, head.out_features, bias=False)
        self._parameters['weight'], self.first = head._parameters['weight'], first
        self.tied_to = (embedding,)  # no module of this one
        if embedding is None:
            self.lora_rows = nn.Parameter(torch.empty(head.out_features - first, head.in_features,
                                                      device=self._parameters['weight'].device))

    @property
    def weight(self):
        """The head as it is now (V, C), of which a chunked loss takes the product."""
        rows = self.lora_rows if self.tied_to[0] is None else self.tied_to[0].lora_rows
        frozen = self._parameters['weight'].to(rows.dtype)
        return torch.cat((frozen[:self.first], frozen[self.first:] + rows))

    def merged(self):
        return self.weight.float()


class Adapter(nn.Module):
    """A bottleneck with a residual of its own behind a frozen sublayer (arXiv:1902.00751); `up` starts at zero."""

    def __init__(self, n_embd, dim):
        super().__init__()
        self.down = nn.Parameter(torch.empty(dim, n_embd))
        self.down_bias = nn.Parameter(torch.empty(dim))
        self.up = nn.Parameter(torch.empty(n_embd, dim))
        self.up_bias = nn.Parameter(torch.empty(n_embd))

    def forward(self, x):
        return x + F.linear(F.gelu(F.linear(x, self.down, self.down_bias)), self.up, self.up_bias)


# ----------------------------------------------------------------------------------------------------------------------
# 4 bits

class BF16Embedding(nn.Embedding):
    """An embedding stored in bfloat16; it returns float32, so the residual stream starts in full precision."""

    def forward(self, idx):
        return super().forward(idx).float()


def embeddings_to_bf16(model):
    """Embeddings and head of a GPT into bfloat16."""
    def half(parameter):
        return nn.Parameter(parameter.detach().bfloat16(), requires_grad=False)
    with on_meta():
        embedding = BF16Embedding(*model.tok_emb.weight.shape)
        head = Head(*model.tok_emb.weight.T.shape, bias=False)
    embedding.weight = half(model.tok_emb.weight)
    if model.head is not None:  # a reward model's has none
        head.weight = embedding.weight if model.config.tie_weights else half(model.head.weight)
        model.head = head
    model.tok_emb = embedding
    if model.pos_emb is not None:
        model.pos_emb.weight = half(model.pos_emb.weight)


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

    packed: float8_e4m3 numbers viewed as bytes, so that model.to(dtype) leaves them alone, padded to a multiple of
    256. scale = packed * steps[its group of 256] + mean; steps (groups,) and mean () are float32.
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
