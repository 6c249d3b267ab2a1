"""
What a model consists of: self-attention with numbers for a pencil, and the parameters, FLOP and memory of a config.

    python model.py                              the lesson, and GPT-2
    python model.py config/tiny.py --vocab_size=1024    what a config makes
"""
import math
from pathlib import Path

import runtime

import torch

import lora
from generate import state_bytes
from lora import LoRAConfig
from model import GPT, Attention, GatedDeltaNet, GPTConfig, MoE, on_meta
from reward_model import ScoreConfig

WORDS, ROWS = ('the', 'cat', 'sat'), ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0))  # three tokens, two numbers each


def pencil(**options):
    """An Attention of one head whose numbers a pencil can follow: queries and keys are the tokens' own numbers, values
    are twelve times these. Scores are multiplied by ln 2, so that the softmax of 0, 1, 2 is 1, 2, 4 in proportion."""
    attention = Attention(GPTConfig(n_layer=1, n_head=1, n_embd=2, block_size=3, vocab_size=3, bias=False,
                                    attn_scale=math.log(2), **options))
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


@torch.no_grad()
def attention_maps(model, ids, source=None):
    """What each head of each layer looks at in one text, a list of ids -> [(name, (H, T, S) float32)], row t the
    weights of token t's query. source: ids that an encoder reads; its own maps come first, then, layer by layer,
    what the decoder sees of itself and of the source."""
    modules = [(name.replace('blocks', 'layer').replace('attn', 'self'), module)
               for name, module in model.named_modules() if isinstance(module, Attention)]
    for _, module in modules:
        module.watched = []
    was_training = model.training
    model.eval()  # dropout must not reach a map
    try:
        idx = torch.tensor([ids], device=model.tok_emb.weight.device)
        memory = None if source is None else model.encode(torch.tensor([source], device=idx.device))
        model.hidden(idx, segments=torch.zeros_like(idx), memory=memory)
        return [(name, module.watched[0][0]) for name, module in modules if module.watched]
    finally:
        model.train(was_training)
        for _, module in modules:
            module.watched = None


def anatomy(config, lora_config=None):
    """What a model consists of, without making it -> rows (part, how many of it, parameters of all of them), and the
    model on the meta device."""
    with on_meta():
        model = lora.apply(GPT(config), lora_config or LoRAConfig())
    parts, seen = {}, set()
    names = {'tok_emb': 'token embedding', 'pos_emb': 'positions', 'head': 'head', 'attn': 'attention',
             'cross': 'cross-attention', 'mlp': 'MLP'}
    for name, p in model.named_parameters(remove_duplicate=False):
        words = name.split('.')
        owner = '.'.join(words[:3 if words[0] in ('blocks', 'encoder', 'future') else 1])  # blocks.0.attn, or head
        module = model.get_submodule(owner)
        if lora.is_new(name):
            part = 'LoRA and adapters'
        elif isinstance(module, MoE):
            part = 'experts'
        elif isinstance(module, GatedDeltaNet):
            part = 'Gated DeltaNet'
        else:
            part = names.get(owner.split('.')[-1], 'norms')
        owners, count = parts.setdefault(part, (set(), 0))
        owners.add(owner)
        parts[part] = owners, count + (0 if id(p) in seen else p.numel())
        seen.add(id(p))
    in_4_bits = sum(m.in_features * m.out_features for m in model.elsewhere())
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


def table(config, lora_config=None):
    """Prints what a model of a config consists of, computes and keeps in memory."""
    rows, model = anatomy(config, lora_config)
    total, T = model.num_params(), config.block_size
    print(f'\n{"part":<28}{"how many":>9}{"parameters":>15}{"share":>8}')
    for part, count, numbers in rows:
        print(f'{part:<28}{count:>9}' + (f'{numbers:>15,}{numbers / total:>8.1%}' if numbers else ' (the embedding)'))
    print(f'{"all":<28}{"":>9}{total:>15,}\n')
    learn = model.num_params(learning=True)
    flops, cache = model.flops_per_token(T), config.cache_width
    kept = min(T, config.window + config.n_sink) if config.window and 'G' not in config.window_pattern else T
    for what, value in (
            ('vocabulary, context', f'{config.vocab_size:,} tokens, {T:,} tokens'),
            ('a token forward and backward', f'{flops / 1e6:,.1f} MFLOP at the whole context'),
            ('a trillion FLOP/s, all used', f'{1e12 / flops:,.0f} tokens/s'),
            ('weights', f'{model.memory() / 1e6:,.1f} MB as they are trained, {total * 2 / 1e6:,.1f} MB in 16 bits'),
            ('gradients, moments of AdamW', f'{learn * 4 / 1e6:,.1f} MB, {learn * 8 / 1e6:,.1f} MB'),
            ('KV cache in 16 bits', f'{cache * 2:,} bytes a token, {cache * 2e-6 * kept:,.1f} MB for {kept:,}'),
            *([('states', f'{state_bytes(config):,} bytes a text')] if config.n_delta else [])):
        print(f'{what:<31}{value}')


def main():
    here = Path(__file__).parent
    stages = [here / f'{name}.py' for name in ('train', 'sft', 'reward', 'dpo', 'ppo', 'grpo', 'distill')]
    stages = [stage for stage in stages if stage.exists()]
    _, given = runtime.configure(globals(), GPTConfig, LoRAConfig, ScoreConfig, *stages)
    args, added = ({key: value for key, value in given.items() if key in config.__dataclass_fields__}
                   for config in (GPTConfig, LoRAConfig))
    with runtime.user_errors():
        config, lora_config = GPTConfig(**args), LoRAConfig(**added)
    if not given:
        lesson()
    table(config, lora_config)
    if given and 'vocab_size' not in args:
        print('A run takes the vocabulary of its data instead: --vocab_size=N')


def cli():
    runtime.cli(main)


if __name__ == '__main__':
    cli()
