"""
Models in and out: Hugging Face directories (config.json and safetensors), GGUF files, and LoRA as PEFT has it.

    python convert.py out/tiny exported          a run of ours -> a directory that transformers, vLLM, … read;
                                                 --type=f32, f16, bf16, else in the run's dtype
    python convert.py hf_directory out/name      a Hugging Face directory, a .gguf file or a name -> a run of ours
    python convert.py out/lora exported --peft   the LoRA of a run, without its base -> a directory that PEFT reads
    python convert.py out/tiny mine.gguf         any of these -> one file for llama.cpp, ollama, …, and a Modelfile
                                                 --type=f16 (the default, whatever the run's dtype), f32, bf16, q8_0

A family is a row of FAMILIES, its tensors a table from our names to theirs in TABLES; both directions walk them. The
keys and defaults of config.json are those of transformers (models/*/configuration_*.py), in its spelling of today
(`rope_parameters`, `dtype`) and of before (`rope_theta`, `rope_scaling`, `torch_dtype`). What a model of ours cannot do
is refused by its key, not dropped. Nothing here unpickles a stranger's file. GGUF is in gguf_format.py.

Format: https://huggingface.co/docs/safetensors
"""
import contextlib
import dataclasses
import difflib
import functools
import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import runtime

import torch

import lora
import tokenizer as tokenizers
from lora import LoRAConfig, LoRALinear
from model import GPT, GPTConfig, on_meta
from progress import counted
from tokenizer import UserError

GPT2 = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
HUB = {'smollm2': 'HuggingFaceTB/SmolLM2-135M-Instruct', 'gemma3-270m': 'google/gemma-3-270m'}
HUB |= {name: f'openai-community/{name}' for name in GPT2}

# ----------------------------------------------------------------------------------------------------------------------
# names: ours -> theirs, without '.weight' and '.bias'; # is the layer, [qkv] three tensors that ours joins, * an expert

LAYER, OSS = 'model.layers.#.', 'model.layers.#.mlp.experts.'
LLAMA = {
    'tok_emb': 'model.embed_tokens', 'norm': 'model.norm', 'head': 'lm_head',
    'blocks.#.norm1': LAYER + 'input_layernorm', 'blocks.#.norm2': LAYER + 'post_attention_layernorm',
    'blocks.#.attn.qkv': LAYER + 'self_attn.[qkv]_proj', 'blocks.#.attn.proj': LAYER + 'self_attn.o_proj',
    'blocks.#.attn.q_norm': LAYER + 'self_attn.q_norm', 'blocks.#.attn.k_norm': LAYER + 'self_attn.k_norm',
    'blocks.#.mlp.gate': LAYER + 'mlp.gate_proj', 'blocks.#.mlp.up': LAYER + 'mlp.up_proj',
    'blocks.#.mlp.down': LAYER + 'mlp.down_proj',
}
EXPERTS_APART = {f'blocks.#.mlp.{name}*': f'{OSS}*.{name}_proj.weight' for name in ('gate', 'up', 'down')}
DELTA = LAYER + 'linear_attn.'
TABLES = {
    'gpt2': {
        'tok_emb': 'transformer.wte', 'pos_emb': 'transformer.wpe', 'norm': 'transformer.ln_f', 'head': 'lm_head',
        'blocks.#.norm1': 'transformer.h.#.ln_1', 'blocks.#.norm2': 'transformer.h.#.ln_2',
        'blocks.#.attn.qkv': 'transformer.h.#.attn.c_attn', 'blocks.#.attn.proj': 'transformer.h.#.attn.c_proj',
        'blocks.#.mlp.up': 'transformer.h.#.mlp.c_fc', 'blocks.#.mlp.down': 'transformer.h.#.mlp.c_proj',
    },
    **dict.fromkeys(('llama', 'mistral', 'qwen2', 'qwen3', 'smollm3', 'granite'), LLAMA),
    'phi3': LLAMA | {'blocks.#.attn.qkv': LAYER + 'self_attn.qkv_proj'},  # gate and up: see `gate_up_apart`
    'gemma3_text': LLAMA | {
        'blocks.#.norm1_out': LAYER + 'post_attention_layernorm', 'blocks.#.norm2': LAYER + 'pre_feedforward_layernorm',
        'blocks.#.norm2_out': LAYER + 'post_feedforward_layernorm',
    },
    **dict.fromkeys(('olmo2', 'olmo3'), LLAMA | {
        'blocks.#.norm1': LAYER + 'post_attention_layernorm', 'blocks.#.norm2': LAYER + 'post_feedforward_layernorm'}),
    'mixtral': LLAMA | {
        'blocks.#.mlp.router': LAYER + 'block_sparse_moe.gate',
        'blocks.#.mlp.gate*': LAYER + 'block_sparse_moe.experts.*.w1.weight',
        'blocks.#.mlp.up*': LAYER + 'block_sparse_moe.experts.*.w3.weight',
        'blocks.#.mlp.down*': LAYER + 'block_sparse_moe.experts.*.w2.weight',
    },
    'qwen3_moe': LLAMA | {'blocks.#.mlp.router': LAYER + 'mlp.gate', **EXPERTS_APART},
    'gpt_oss': LLAMA | {  # of whose experts `oss_experts` makes these
        'blocks.#.attn.sink*': LAYER + 'self_attn.sinks', 'blocks.#.mlp.router': LAYER + 'mlp.router',
        'blocks.#.mlp.gate*': OSS + 'gate_up_proj[gate]', 'blocks.#.mlp.gate_bias*': OSS + 'gate_up_proj_bias[gate]',
        'blocks.#.mlp.up*': OSS + 'gate_up_proj[up]', 'blocks.#.mlp.up_bias*': OSS + 'gate_up_proj_bias[up]',
        'blocks.#.mlp.down*': OSS + 'down_proj', 'blocks.#.mlp.down_bias*': OSS + 'down_proj_bias',
    },
    'deepseek_v3': LLAMA | {
        'blocks.#.attn.q_a': LAYER + 'self_attn.q_a_proj', 'blocks.#.attn.q_norm': LAYER + 'self_attn.q_a_layernorm',
        'blocks.#.attn.q': LAYER + 'self_attn.q_b_proj',  # q_proj where there is no q_a
        'blocks.#.attn.kv_a': LAYER + 'self_attn.kv_a_proj_with_mqa',
        'blocks.#.attn.kv_norm': LAYER + 'self_attn.kv_a_layernorm',
        'blocks.#.attn.kv_b': LAYER + 'self_attn.kv_b_proj', 'blocks.#.mlp.router': LAYER + 'mlp.gate',
        'blocks.#.mlp.choice_bias*': LAYER + 'mlp.gate.e_score_correction_bias', **EXPERTS_APART,
        **{f'blocks.#.mlp.shared.{name}': f'{LAYER}mlp.shared_experts.{name}_proj' for name in ('gate', 'up', 'down')},
    },
    'qwen3_next': LLAMA | {  # attn of a GatedDeltaNet is called delta here; of its matrices `next_rows` makes these
        'blocks.#.attn.attn_gate': LAYER + 'self_attn.q_proj[gate]', 'blocks.#.delta.qkv': DELTA + 'in_proj_qkvz',
        'blocks.#.delta.attn_gate': DELTA + 'in_proj_qkvz[gate]', 'blocks.#.delta.rates': DELTA + 'in_proj_ba',
        'blocks.#.delta.conv*': DELTA + 'conv1d.weight', 'blocks.#.delta.A_log*': DELTA + 'A_log',
        'blocks.#.delta.dt_bias*': DELTA + 'dt_bias', 'blocks.#.delta.norm': DELTA + 'norm',
        'blocks.#.delta.proj': DELTA + 'out_proj', 'blocks.#.mlp.router': LAYER + 'mlp.gate', **EXPERTS_APART,
        'blocks.#.mlp.shared_router': LAYER + 'mlp.shared_expert_gate',
        **{f'blocks.#.mlp.shared.{name}': f'{LAYER}mlp.shared_expert.{name}_proj' for name in ('gate', 'up', 'down')},
    },
    'gguf': {
        'tok_emb': 'token_embd', 'norm': 'output_norm', 'head': 'output',
        'blocks.#.norm1': 'blk.#.attn_norm', 'blocks.#.norm2': 'blk.#.ffn_norm',
        'blocks.#.norm1_out': 'blk.#.post_attention_norm', 'blocks.#.norm2_out': 'blk.#.post_ffw_norm',
        'blocks.#.attn.qkv': 'blk.#.attn_[qkv]', 'blocks.#.attn.proj': 'blk.#.attn_output',
        'blocks.#.attn.q_norm': 'blk.#.attn_q_norm', 'blocks.#.attn.k_norm': 'blk.#.attn_k_norm',
        'blocks.#.mlp.gate': 'blk.#.ffn_gate', 'blocks.#.mlp.up': 'blk.#.ffn_up', 'blocks.#.mlp.down': 'blk.#.ffn_down',
        'blocks.#.mlp.router': 'blk.#.ffn_gate_inp', 'blocks.#.mlp.gate*': 'blk.#.ffn_gate_exps.weight',
        'blocks.#.mlp.up*': 'blk.#.ffn_up_exps.weight', 'blocks.#.mlp.down*': 'blk.#.ffn_down_exps.weight',
    },
}
TABLES['gguf_gpt2'] = TABLES['gguf'] | {'pos_emb': 'position_embd', 'blocks.#.attn.qkv': 'blk.#.attn_qkv'}


def parts(name, tensor, config, family):
    """The tensors of a family's files that ours is made of: a list of (their name, the view of ours that it fills)."""
    stem, _, kind = name.rpartition('.')
    layer = re.search(r'\d+', stem + kind)
    if kind not in ('weight', 'bias'):  # the experts of a layer, stacked, or what has no module of its own
        stem, kind = name + '*', ''
    if layer and config.is_delta(int(layer[0])):
        stem = stem.replace('.attn.', '.delta.')
    theirs = '.'.join(filter(None, (TABLES[family][re.sub(r'\.\d+\.', '.#.', stem)], kind)))
    theirs = theirs.replace('#', layer[0]) if layer else theirs
    theirs = theirs if config.q_lora_rank else theirs.replace('.q_b_proj', '.q_proj')
    if '[qkv]' in theirs:
        rows = [n * config.head_dim for n in (config.n_head, config.n_kv_head, config.n_kv_head)]
        return [(theirs.replace('[qkv]', c), view) for c, view in zip('qkv', tensor.split(rows), strict=True)]
    if stem.endswith('delta.conv*'):
        return [(theirs, tensor.view(config.delta_conv, -1).T[:, None])]
    if '*' in theirs:
        return [(theirs.replace('*', str(e)), view) for e, view in enumerate(tensor)]
    if re.search('(gate|up|down)_bias[*]$', stem):
        return [(theirs, tensor.view(config.n_expert, -1))]
    # GPT-2's Conv1D keeps its matrices (in, out)
    return [(theirs, tensor.T if family == 'gpt2' and stem.startswith('blocks') and tensor.ndim == 2 else tensor)]


def build(args, overrides, family, sources, dtype, where):
    """A GPT with the fields args | overrides and the weights of sources {their name: (file, shape, read)}.

    read() -> the tensor. No weight is initialised and none is held twice. UserError names the file and the tensor that
    is missing, left over or misshapen, or the field that is impossible.
    """
    known(overrides)
    with runtime.user_errors(where):
        config = GPTConfig(**args | overrides)
        for wrong, why in (
                (config.n_layer > len(sources), f'{config.n_layer} layers, but only {len(sources)} tensors'),
                (config.n_future, f'n_future={config.n_future}: it has no further heads: drop --n_future'),
                (config.block_size > 1 << 24, f'impossible block_size={config.block_size}')):
            if wrong:
                raise ValueError(why)
        try:
            with on_meta():
                model = GPT(config)
        except (RuntimeError, OverflowError, MemoryError, TypeError) as error:  # sizes that no machine has
            raise ValueError(f'impossible sizes ({str(error).splitlines()[0][:100]})') from None
    own, left, weights = model.state_dict(), dict(sources), {}
    if config.tie_weights:
        del own['head.weight']
    for name, like in own.items():  # what is wrong shows before anything large is read
        for theirs, view in parts(name, like, config, family):
            if theirs not in left:
                raise UserError(f'{where}: tensor {theirs} is missing')
            file, shape, _ = left.pop(theirs)
            if tuple(shape) != view.shape:
                raise UserError(f'{file}: tensor {theirs} has shape {tuple(shape)} where this model has '
                                f'{tuple(view.shape)}')
    for theirs, (file, _, _) in left.items():
        raise UserError(f'{file}: tensor {theirs} is not part of this model')
    for name, like in counted(own.items(), f'reading {where}', 'tensors', stream=sys.stderr):
        weights[name] = torch.empty(like.shape, dtype=torch.float32 if name.endswith('choice_bias') else dtype)
        for theirs, view in parts(name, weights[name], config, family):
            _fill(view, sources, theirs)
    return model.assign(weights)


def check_tensors(own, given):
    """ValueError with one sentence where given tensors {name: tensor} do not have the names and shapes of own ones."""
    for name in [*own, *given]:
        if name not in own or name not in given:
            raise ValueError(f'tensor {name} is {"missing" if name in own else "not part of this model"}')
        if own[name].shape != given[name].shape:
            raise ValueError(f'tensor {name} has shape {tuple(given[name].shape)} where this model has '
                             f'{tuple(own[name].shape)}')


def known(overrides):
    """UserError for an override that is no field of GPTConfig."""
    for key in overrides:
        if key not in GPTConfig.__dataclass_fields__:
            near = difflib.get_close_matches(key, GPTConfig.__dataclass_fields__, 1, 0)[0]
            raise UserError(f'{key!r} is no field of a model; did you mean {near}?')


def read_tensor(sources, name):
    file, _, read = sources[name]
    try:
        return read()
    except Exception as error:  # damaged in one of many ways
        raise UserError(f'{file}: tensor {name} cannot be read ({reason_of(error)})') from None


def _fill(view, sources, name):
    view.copy_(read_tensor(sources, name))
    if not view.sum(dtype=torch.float32).isfinite():  # in one pass: isfinite of each takes ten times as long
        raise UserError(f'{sources[name][0]}: tensor {name} has values that are not finite (nan or inf): its training '
                        'diverged, or the file is damaged')


def reason_of(error):
    return (str(error).strip().split('\n')[0] or type(error).__name__)[:120]


def fits(tokenizer, model, where):
    """The tokenizer, if the model has an embedding for each of its ids; a larger embedding is padding."""
    if tokenizer is not None and tokenizer.n_vocab > model.config.vocab_size:
        raise UserError(f'{where}: the tokenizer has {tokenizer.n_vocab} tokens, the embedding '
                        f'{model.config.vocab_size}: take out tokens that were added, or resize the embedding')
    return tokenizer


# ----------------------------------------------------------------------------------------------------------------------
# config.json: what several families have in common

KEYS = {  # our field: theirs, the first that is there
    'vocab_size': ('vocab_size',), 'block_size': ('max_position_embeddings', 'n_positions'),
    'n_embd': ('hidden_size', 'n_embd'), 'n_layer': ('num_hidden_layers', 'n_layer'),
    'n_head': ('num_attention_heads', 'n_head'), 'n_kv_head': ('num_key_value_heads',), 'head_dim': ('head_dim',),
    'mlp_dim': ('intermediate_size', 'n_inner'), 'norm_eps': ('rms_norm_eps', 'layer_norm_epsilon'),
    'tie_weights': ('tie_word_embeddings',), 'n_expert': ('num_local_experts', 'num_experts'),
    'n_expert_active': ('num_experts_per_tok',), 'expert_dim': ('moe_intermediate_size',),
    'delta_heads': ('linear_num_value_heads',), 'delta_key_heads': ('linear_num_key_heads',),
    'delta_key_dim': ('linear_key_head_dim',), 'delta_value_dim': ('linear_value_head_dim',),
    'delta_conv': ('linear_conv_kernel_dim',),
}
SPARSE_KEYS = KEYS | {'expert_dim': KEYS['mlp_dim']}  # of families without another MLP
LATENT_KEYS = KEYS | {
    'head_dim': ('qk_nope_head_dim',), 'n_expert': ('n_routed_experts', 'num_local_experts'),
    'n_expert_shared': ('n_shared_experts',), 'kv_lora_rank': ('kv_lora_rank',), 'q_lora_rank': ('q_lora_rank',),
    'qk_rope_dim': ('qk_rope_head_dim',), 'v_head_dim': ('v_head_dim',), 'router_groups': ('n_group',),
    'router_groups_active': ('topk_group',), 'router_scale': ('routed_scaling_factor',),
    'dense_layers': ('first_k_dense_replace',),
}
NULLABLE = ('num_key_value_heads', 'head_dim', 'intermediate_size', 'n_inner', 'q_lora_rank', 'qk_nope_head_dim')
ONLY = {  # keys that change what a model computes, and the one value that we can honour
    'attention_bias': False, 'mlp_bias': False, 'partial_rotary_factor': 1.0, 'scale_attn_weights': True,
    'scale_attn_by_inverse_layer_idx': False, 'add_cross_attention': False, 'is_encoder_decoder': False,
    'rope_interleaved': False, 'quantization_config': None, 'pruned_heads': {}, 'is_causal': True,
    'original_max_position_embeddings': None, 'attn_logit_softcapping': None, 'use_bidirectional_attention': False,
    'swiglu_alpha': 1.702, 'swiglu_limit': 7.0, 'scoring_func': 'sigmoid', 'topk_method': 'noaux_tc',
    'moe_layer_freq': 1,
}
TURNS = {'llama3': ('low_freq_factor', 'high_freq_factor'), 'yarn': ('beta_slow', 'beta_fast')}  # rope_low, rope_high
LOCAL, FULL, LINEAR = 'sliding_attention', 'full_attention', 'linear_attention'


class Json:
    """An object of a JSON file whose values are checked as they are asked for; UserError names file, key and value."""

    def __init__(self, values, where, prefix=''):
        self.values, self.where, self.prefix = values, where, prefix

    def get(self, key, default=None):
        return self.values.get(key, default)

    def refuse(self, key, why='is not supported'):
        raise UserError(f'{self.where}: {self.prefix}{key}={self.get(key)!r:.100} {why}')

    def number(self, key, default, least=1):
        """The value as the type of the default: true or false, a whole number from `least` on, a positive number."""
        value, kind = self.values.get(key, default), type(default)
        if kind is bool and not isinstance(value, bool):
            self.refuse(key, 'must be true or false')
        if kind is not bool and (isinstance(value, bool) or not isinstance(value, (int, float))):
            self.refuse(key, 'must be a number')
        if kind is int and not (isinstance(value, int) or value.is_integer()) or kind is int and value < least:
            self.refuse(key, f'must be a whole number of at least {least}')
        if kind is float and not 0 < value < 1e300:
            self.refuse(key, 'must be a positive number')
        return kind(value)

    def object(self, key):
        value = self.values.get(key) or {}
        if not isinstance(value, dict):
            self.refuse(key, 'must be an object')
        return Json(value, self.where, f'{self.prefix}{key}.')


def read_json(path):
    """The object of a JSON file; UserError where there is none."""
    try:
        values = json.loads(Path(path).read_text(encoding='utf-8'))
    except OSError as error:
        raise UserError(f'{path}: {error.strerror}') from None
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path}: not JSON ({reason_of(error)})') from None
    if not isinstance(values, dict):
        raise UserError(f'{path}: not a JSON object')
    return Json(values, path)


def period(pattern):
    """The shortest letters that, again and again, make a pattern."""
    n = len(pattern)
    return next(pattern[:p] for p in range(1, n + 1) if (pattern[:p] * n)[:n] == pattern)


def renormalised(args, there):
    """router_renorm of a model whose router renormalises there, a single expert's weight, too."""
    return 'always' if there and args['n_expert_active'] == 1 else there


def rope_of(config):
    """The object of rotary parameters, in either spelling."""
    return config.object('rope_scaling' if config.get('rope_scaling') else 'rope_parameters')


def rope_args(config, family, block_size):
    """The fields of GPTConfig for the rotary wavelengths, in any spelling; of some families by the kind of layer."""
    rope, apart = rope_of(config), bool(family.local_theta)
    if not rope.values:
        rope = Json(family.rope, config.where, rope.prefix)
    by_kind = any(isinstance(value, dict) for value in rope.values.values())
    if by_kind and not (apart and rope.values.keys() <= {LOCAL, FULL}) or (
            apart and not by_kind and rope.values and rope.prefix == 'rope_parameters.'):
        config.refuse(rope.prefix[:-1])
    full, local = (rope.object(FULL), rope.object(LOCAL)) if by_kind else (rope, Json({}, config.where))
    args = wavelengths(config, full, family, block_size)
    if apart:
        if local.get('rope_type', 'default') != 'default':
            local.refuse('rope_type')
        base = local.number('rope_theta', 0.0) if 'rope_theta' in local.values else config.number(*family.local_theta)
        args['rope_theta_local'] = base if 'rope_scaling' in args or base != args['rope_theta'] else 0.0
    return args


def wavelengths(config, rope, family, block_size):  # noqa: C901
    """The fields of GPTConfig that an object of rotary parameters says."""
    where = rope if 'rope_theta' in rope.values else config
    args = {'rope_theta': where.number('rope_theta', family.theta)}
    kind, part = rope.get('rope_type', rope.get('type', 'default')), 'partial_rotary_factor'
    if part not in family.honoured and rope.get(part) not in (None, 1):
        rope.refuse(part)
    if kind == 'default':
        return args
    if kind not in ('linear', 'llama3', 'yarn'):
        rope.refuse('rope_type' if 'rope_type' in rope.values else 'type')
    original = rope.number('original_max_position_embeddings', block_size)
    if kind == 'yarn' and rope.get('factor') is None:
        factor = block_size / original
    else:
        if 'factor' not in rope.values:
            rope.refuse('factor', 'is missing')
        factor = rope.number('factor', 1.0)
    if factor < 1:
        rope.refuse('factor', 'must be at least 1')
    if kind == 'yarn':
        usual = sharpen = 0.1 * math.log(factor) + 1
        if rope.get('attention_factor') is not None:
            sharpen = rope.number('attention_factor', usual)
        elif rope.get('mscale') and rope.get('mscale_all_dim'):
            sharpen = mscale(rope, 'mscale', factor) / mscale(rope, 'mscale_all_dim', factor)
        if abs(sharpen - usual) > 1e-6 and factor == 1:
            rope.refuse('attention_factor', 'is not supported beside a factor of 1')
        args['rope_mscale'] = sharpen if abs(sharpen - usual) > 1e-6 else 0.0
        args['rope_truncate'] = rope.number('truncate', True)
    if factor == 1:  # nothing is stretched
        return args
    if not family.stretched:
        rope.refuse('rope_type' if 'rope_type' in rope.values else 'type')
    for field, key in zip(('rope_low', 'rope_high'), TURNS.get(kind, ()), strict=False):
        if kind == 'llama3' or rope.get(key):
            args[field] = rope.number(key, 0.0)
    return args | {'rope_scaling': kind, 'rope_factor': factor, 'rope_original': original}


def mscale(rope, key, factor):
    """What YaRN sharpens attention by, as a key of DeepSeek's weighs it."""
    return 0.1 * rope.number(key, 0.0) * math.log(factor) + 1 if factor > 1 and rope.get(key) else 1.0


def window_args(config, family, n_layer):
    """The fields of GPTConfig for sliding windows; none where every layer sees everything."""
    window = 0
    wanted = family.window is not None and (not family.switched or config.number('use_sliding_window', False))
    if wanted and config.get('sliding_window', family.window or None) is not None:
        window = config.number('sliding_window', family.window)
    local = family.local(config, n_layer) if family.local else [True] * n_layer
    types, given = [LOCAL if window and here else FULL for here in local], config.get('layer_types')
    if given is not None and given != types:
        if not family.local or not isinstance(given, list) or len(given) != n_layer:
            config.refuse('layer_types')
        if any(kind not in (LOCAL, FULL) for kind in given) or not window and LOCAL in given:
            config.refuse('layer_types')
        types = given
    if LOCAL not in types:
        return {}
    return {'window': window, 'window_pattern': period(''.join('L' if kind == LOCAL else 'G' for kind in types))}


def local_layers(config):
    """For each layer of a GPTConfig whether it has the window."""
    return [config.is_local(i) for i in range(config.n_layer)]


def rope_values(config):
    """config.json's object for the rotary wavelengths of a GPTConfig."""
    kind, rope = config.rope_scaling, {'rope_type': 'default'}
    if kind != 'none':
        rope = {'rope_type': kind, 'factor': config.rope_factor}
    if kind in TURNS:
        low, high = TURNS[kind]
        rope |= {'original_max_position_embeddings': config.rope_original, low: config.rope_low,
                 high: config.rope_high}
    if kind == 'yarn':
        rope |= {'truncate': config.rope_truncate}
        rope |= {'attention_factor': config.rope_mscale} if config.rope_mscale else {}
    if config.attn_scale and config.kv_lora_rank:  # a factor on scores, which goes by the name of another key there
        width, stretch = config.head_dim + config.qk_rope_dim, 0.1 * math.log(config.rope_factor)
        sharpen = math.sqrt(config.attn_scale * math.sqrt(width))
        whole = (config.rope_mscale or 1 + stretch) * sharpen
        rope |= {'mscale_all_dim': round((sharpen - 1) / stretch, 9), 'mscale': round((whole - 1) / stretch, 9)}
    return rope


def rotary_values(config, by_kind=False):
    """What config.json says of every model with rotary positions; by_kind: of each kind of layer."""
    rope = rope_values(config)
    new = rope | {'rope_theta': config.rope_theta}
    if by_kind:
        local = config.rope_theta_local or config.rope_theta
        new = {FULL: new, LOCAL: {'rope_type': 'default', 'rope_theta': local}}
    return {'hidden_act': 'silu', 'rope_theta': config.rope_theta,  # for transformers 4, with the next
            'rope_scaling': None if config.rope_scaling == 'none' else rope,
            'rope_parameters': new}  # for transformers 5


def layer_types(config):
    return {'layer_types': [LOCAL if here else FULL for here in local_layers(config)]}


# ----------------------------------------------------------------------------------------------------------------------
# config.json: what one family has. read_…(config.json, args so far) -> more fields of GPTConfig, write_…(GPTConfig,
# values of KEYS) -> all values of config.json, …_wants(GPTConfig) -> {field: values that can leave}

def gpt2_wants(config):
    heads = math.gcd(config.n_embd, config.n_head)
    return {'n_head': [heads], 'n_kv_head': [heads], 'head_dim': [config.n_embd // heads]}


def write_gpt2(config, values):
    return values | {'activation_function': 'gelu_new' if config.mlp == 'gelu_tanh' else 'gelu',
                     'resid_pdrop': config.dropout, 'embd_pdrop': config.dropout, 'attn_pdrop': config.dropout}


def write_llama(config, values, **more):
    return values | rotary_values(config) | more | {'attention_bias': False, 'mlp_bias': False}


def write_mistral(config, values, by_kind=False):
    window = config.window if any(local_layers(config)) else None
    return values | rotary_values(config, by_kind) | {'sliding_window': window}


def upper_layers(config, n_layer):
    """Of a Qwen: the first max_window_layers see everything."""
    first = config.number('max_window_layers', 28, 0)
    return [i >= first for i in range(n_layer)]


def every_nth(n_layer, n):
    """Every n-th layer sees everything."""
    return [(i + 1) % n > 0 for i in range(n_layer)]


def write_qwen(config, values):
    local = local_layers(config)
    return write_mistral(config, values) | {
        'use_sliding_window': any(local), 'max_window_layers': local.index(True) if any(local) else config.n_layer,
        } | layer_types(config)


def read_smollm3(config, args):
    if config.get('use_sliding_window'):
        config.refuse('use_sliding_window')
    n, every, given = args['n_layer'], config.number('no_rope_layer_interval', 4), config.get('no_rope_layers')
    rotated = every_nth(n, every) if given is None else given
    if not isinstance(rotated, list) or len(rotated) < n or any(r not in (0, 1) for r in rotated):
        config.refuse('no_rope_layers', 'must be a 0 or a 1 for each layer')
    return {'rope_pattern': period(''.join('NR'[r] for r in rotated[:n]))}


MULTIPLIERS = {'embed_scale': 'embedding_multiplier', 'attn_scale': 'attention_multiplier',
               'residual_scale': 'residual_multiplier', 'logit_scale': 'logits_scaling'}  # of Granite; the last divides


def read_granite(config, args):
    found = {field: config.number(key, 1.0) for field, key in MULTIPLIERS.items()}
    return found | {'logit_scale': 1 / found['logit_scale']}


def write_granite(config, values):
    found = {key: getattr(config, field) for field, key in MULTIPLIERS.items()} | {
        'attention_multiplier': config.attn_scale or config.head_dim ** -0.5,
        'logits_scaling': float(f'{1 / config.logit_scale:.15g}')}
    return write_llama(config, values, **found)


def read_gemma3(config, args):
    scalar, cap = config.number('query_pre_attn_scalar', 256.0), 'final_logit_softcapping'
    return {'embed_scale': math.sqrt(args['n_embd']),
            'attn_scale': 0.0 if scalar == args['head_dim'] else scalar ** -0.5,
            'logit_softcap': 0.0 if config.get(cap) is None else config.number(cap, 0.0)}


def gemma3_wants(config):
    scalar = config.attn_scale and config.attn_scale ** -2  # a whole number there
    whole = math.isclose(round(scalar), scalar, rel_tol=1e-9)
    return {'embed_scale': [math.sqrt(config.n_embd)], 'attn_scale': [config.attn_scale if whole else 0.0]}


def write_gemma3(config, values):
    values = write_mistral(config, values, by_kind=True)
    del values['hidden_act']
    window = values.pop('sliding_window') or config.block_size  # transformers wants one even where no layer has it
    return values | {
        'hidden_activation': 'gelu_pytorch_tanh',
        'rope_local_base_freq': config.rope_theta_local or config.rope_theta,
        'query_pre_attn_scalar': round(config.attn_scale ** -2) if config.attn_scale else config.head_dim,
        'final_logit_softcapping': config.logit_softcap or None, 'sliding_window': window} | layer_types(config)


def gate_up_apart(sources, args, where):
    """Sources of a Phi-3, whose gates and ups are one matrix, as those of a Llama."""
    found = {}
    for name, (file, shape, read) in sources.items():
        if not name.endswith('gate_up_proj.weight'):
            found[name] = file, shape, read
            continue
        n = shape[0] // 2
        for part, rows in ('gate', slice(n)), ('up', slice(n, None)):
            found[name.replace('gate_up', part)] = file, [n, *shape[1:]], lambda read=read, rows=rows: read()[rows]
    return found


def mixtral_wants(config):
    """All layers are alike, and the router renormalises."""
    wants = {'dense_layers': [0], 'expert_every': [1], 'router_renorm': [True, 'always']}
    if config.n_expert_active == 1 and not config.renormalises:
        wants |= {'n_expert_active': [2]} if config.n_expert > 1 else {'n_expert': [0]}
    return wants


def read_gpt_oss(config, args):
    key = 'quantization_config'
    if config.get(key) is not None and config.object(key).get('quant_method') != 'mxfp4':
        config.refuse(key)
    return {'bias': config.number('attention_bias', True), 'router_renorm': renormalised(args, True)}


def write_gpt_oss(config, values):
    return write_mistral(config, values) | {
        'sliding_window': config.window or 128, 'attention_bias': config.bias, 'swiglu_alpha': 1.702,
        'swiglu_limit': 7.0} | layer_types(config)


def from_mxfp4(blocks, scales):
    """Bytes of two numbers of 4 bits each (…, G, 16), the low half first, and bytes of the power of two that 32 of them
    share (…, G), 127 for 1 -> (…, 32 G) bfloat16, which holds them exactly."""
    positive = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.bfloat16)
    numbers = torch.cat((positive, -positive))[torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2).int()]
    return torch.ldexp(numbers, scales.int()[..., None] - 127).to(torch.bfloat16).flatten(-2)


def oss_experts(sources, args, where):
    """Sources of a gpt-oss with its experts as ours are: gate and up, whose rows take turns there, apart, matrices
    (E, out, in), and numbers in place of MXFP4."""
    found = {}
    for name, (file, shape, read) in sources.items():
        stem, packed = name.removesuffix('_blocks'), name.endswith('_blocks')
        if '.mlp.experts.' not in name or len(shape) != (2 if name.endswith('_bias') else 3 + packed):
            found[name] = sources[name]
            continue
        if name.endswith('_scales'):
            continue
        if packed and stem + '_scales' not in sources:
            raise UserError(f'{file}: tensor {stem}_scales is missing')

        def rows_of(rows, read=read, packed=packed, scales=stem + '_scales'):
            if packed:
                return from_mxfp4(read()[:, rows], read_tensor(sources, scales)[:, rows])
            tensor = read()
            return (tensor.mT if tensor.ndim == 3 else tensor)[:, rows]
        shape = [*shape[:2], 32 * shape[2]] if packed else [shape[0], *reversed(shape[1:])]
        parts = {'[gate]': slice(0, None, 2), '[up]': slice(1, None, 2)} if 'gate_up' in name else {'': slice(None)}
        for part, rows in parts.items():
            n = len(range(shape[1])[rows])
            found[stem + part] = file, [shape[0], n, *shape[2:]], functools.partial(rows_of, rows)
    return found


def oss_tensors(tensors, config):
    """As gpt-oss has it: `oss_experts`, the other way round, of tensors {name: tensor}."""
    found = {}
    for name, tensor in tensors.items():
        if name.endswith('[gate]'):  # each row of it before that of the other
            name = name.removesuffix('[gate]')
            tensor = torch.stack((tensor, tensors[f'{name}[up]']), 2).flatten(1, 2)
        if not name.endswith('[up]'):
            found[name] = (tensor.mT if tensor.ndim == 3 else tensor).contiguous()
    return found


def read_qwen3_moe(config, args, renorm=False):
    every, n, dense = config.number('decoder_sparse_step', 1), args['n_layer'], config.get('mlp_only_layers') or []
    sparse = [i for i in range(n) if (i + 1) % every == 0 and i not in dense] if isinstance(dense, list) else None
    first = next((k for k in range(n + 1) if sparse == [i for i in range(k, n) if (i + 1) % every == 0]), None)
    if first is None:
        config.refuse('mlp_only_layers', 'must be the first layers')
    return {'router_renorm': renormalised(args, config.number('norm_topk_prob', renorm)),
            'expert_every': every, 'dense_layers': first}


def write_qwen3_moe(config, values):
    values = write_mistral(config, values) | {'use_sliding_window': any(local_layers(config))}
    return values | {
        'num_experts': values.pop('num_local_experts'), 'norm_topk_prob': config.renormalises,
        'decoder_sparse_step': config.expert_every, 'mlp_only_layers': list(range(config.dense_layers))}


def read_qwen3_next(config, args):
    every, n = config.number('full_attention_interval', 4), args['n_layer']
    types = config.get('layer_types')
    types = [LINEAR if (i + 1) % every else FULL for i in range(n)] if types is None else types
    if not isinstance(types, list) or len(types) != n or any(kind not in (LINEAR, FULL) for kind in types):
        config.refuse('layer_types')
    key, rope = 'partial_rotary_factor', rope_of(config)
    where = rope if key in rope.values else config
    rotated = int(args['head_dim'] * where.number(key, 0.25))
    if not 2 <= rotated <= args['head_dim'] or rotated % 2:
        where.refuse(key, f"must make an even part of head_dim={args['head_dim']}")
    pattern = period(''.join('D' if kind == LINEAR else 'A' for kind in types))
    found = read_qwen3_moe(config, args, renorm=True)
    found |= {'rotary_dim': rotated % args['head_dim'], 'layer_pattern': pattern}
    if LINEAR not in types:
        found |= {name: 0 for name in args if name.startswith('delta_')} | {'delta_conv': 4}
    if found['dense_layers'] == n:
        return found | {'n_expert': 0, 'n_expert_active': 2, 'expert_every': 1, 'dense_layers': 0, 'expert_dim': 0,
                        'router_renorm': True}
    shared = config.number('shared_expert_intermediate_size', 512)
    if shared % args['expert_dim']:
        config.refuse('shared_expert_intermediate_size', f"must be a multiple of moe_intermediate_size="
                                                         f"{args['expert_dim']}")
    return found | {'n_expert_shared': shared // args['expert_dim'], 'expert_shared_gate': True}


def write_qwen3_next(config, values):
    part = (config.rotary_dim or config.head_dim) / config.head_dim
    if int(config.head_dim * part) < config.rotary_dim:  # as it computes the other way round
        part = math.nextafter(part, 2)
    values = write_qwen3_moe(config, values)
    values |= {'layer_types': [LINEAR if config.is_delta(i) else FULL for i in range(config.n_layer)],
               'partial_rotary_factor': part, 'attention_bias': False,
               'rope_parameters': values['rope_parameters'] | {'partial_rotary_factor': part},
               'shared_expert_intermediate_size': config.n_expert_shared * config.expert_dim}
    if not config.n_expert:
        values |= {'num_experts': 1, 'num_experts_per_tok': 1, 'mlp_only_layers': list(range(config.n_layer))}
    return {key: value for key, value in values.items() if config.n_delta or not key.startswith('linear_')}


def next_rows(name, n, config):
    """Of a tensor of a Qwen3-Next with n rows those that ours has, in its order: {'': rows} or {'': …, '[gate]': …}; {}
    where both have the same.

    Queries of a head stand beside its gates there, and all that belongs to a head of keys together. The numbers of a
    head that are rotated come first; here each half begins with a half of them, as `apply_rope` wants pairs.
    """
    kind, at, half = '.'.join(name.split('.')[-3:-1]), torch.arange(n), config.rotary_dim // 2
    of_head, shared = torch.arange(config.head_dim), config.delta_heads // max(1, config.delta_key_heads)
    if half:
        first, second, rest = of_head.split([half, half, config.head_dim - 2 * half])
        of_head = torch.cat((first, rest[:len(rest) // 2], second, rest[len(rest) // 2:]))
    heads = {'self_attn.q_proj': 2 * config.n_head, 'self_attn.k_proj': config.n_kv_head, 'self_attn.q_norm': 1,
             'self_attn.k_norm': 1}
    if kind in heads and n == heads[kind] * config.head_dim:
        at = at.view(-1, config.head_dim)
        rows = at[:, of_head]
        return {'': rows[::2].flatten(), '[gate]': at[1::2].flatten()} if 'q_proj' in kind else {'': rows.flatten()}
    if kind == 'linear_attn.in_proj_ba' and n == 2 * config.delta_heads:
        return {'': at.view(-1, 2, shared).transpose(0, 1).flatten()}
    widths = [config.delta_key_dim] * 2 + [shared * config.delta_value_dim] * 2
    if kind == 'linear_attn.in_proj_qkvz' and n == sum(widths) * config.delta_key_heads:
        *qkv, gate = (part.flatten() for part in at.view(-1, sum(widths)).split(widths, 1))
        return {'': torch.cat(qkv), '[gate]': gate}
    return {}


def next_sources(sources, args, where):
    """Sources of a Qwen3-Next with rows as ours has them, see `next_rows`."""
    with runtime.user_errors(where):
        config = GPTConfig(**args)
    found = {}
    for name, (file, shape, read) in without_future(sources, where, lambda name: name.startswith('mtp.')).items():
        for end, rows in (next_rows(name, *shape[:1], config) or {'': None}).items():
            found[name.replace('.weight', f'{end}.weight')] = (file, shape, read) if rows is None else (
                file, [len(rows), *shape[1:]], lambda read=read, rows=rows: read()[rows])
    return found


def next_tensors(tensors, config):
    """As a Qwen3-Next has it: `next_sources`, the other way round, of tensors {name: tensor}."""
    found = {}
    for name, tensor in tensors.items():
        if '[gate]' in name:
            continue
        both = [tensors[n] for n in dict.fromkeys((name, name.replace('.weight', '[gate].weight'))) if n in tensors]
        places = next_rows(name, sum(map(len, both)), config).values()
        found[name] = torch.cat(both) if places else tensor
        for rows, part in zip(places, both, strict=bool(places)):
            found[name][rows] = part
    return found


def without_future(sources, where, ahead):
    """Sources without those ahead(name) of which predict tokens after the next; a line on stderr says how many."""
    kept = {name: source for name, source in sources.items() if not ahead(name)}
    if n := len(sources) - len(kept):
        print(f'{where}: {n} tensors that predict tokens after the next are left out', file=sys.stderr)
    return kept


def read_deepseek(config, args):
    if args['n_kv_head'] not in (0, args['n_head']):
        config.refuse('num_key_value_heads', f"is not num_attention_heads={args['n_head']}")
    if not config.number('rope_interleave', True):
        config.refuse('rope_interleave')
    found = {}
    if args.get('rope_scaling'):  # it sharpens attention by another factor on its scores, too
        sharpen = mscale(rope_of(config), 'mscale_all_dim', args['rope_factor'])
        found['attn_scale'] = sharpen ** 2 / math.sqrt(args['head_dim'] + args['qk_rope_dim']) if sharpen != 1 else 0.0
    if args['dense_layers'] >= args['n_layer']:
        return found | {'n_expert': 0, 'n_expert_active': 2, 'n_expert_shared': 0, 'router_groups': 1,
                        'router_groups_active': 1, 'router_scale': 1.0}
    return found | {'router_score': 'sigmoid', 'router_bias_rate': 0.001,  # as it was trained
                    'router_renorm': renormalised(args, config.number('norm_topk_prob', True))}


def deepseek_wants(config):
    wants = {'kv_lora_rank': [config.kv_lora_rank or 64],
             'attn_scale': [config.attn_scale if config.rope_scaling == 'yarn' else 0.0]}
    if config.n_expert:
        wants |= {name: [getattr(config, name)] for name in (*EXPERTS, 'router_groups', 'router_groups_active')}
        wants |= {'router_score': ['sigmoid'], 'n_expert_shared': [config.n_expert_shared or 1], 'expert_every': [1]}
    return wants


def write_deepseek(config, values):
    values |= {'norm_topk_prob': config.renormalises, 'rope_interleave': True, 'num_nextn_predict_layers': 0,
               'attention_bias': False, 'q_lora_rank': config.q_lora_rank or None}
    if not config.n_expert:
        values |= {'first_k_dense_replace': config.n_layer, 'n_routed_experts': 2, 'n_group': 1, 'topk_group': 1,
                   'n_shared_experts': 1, 'num_experts_per_tok': 1}
    return values | rotary_values(config)


def deepseek_sources(sources, args, where):
    """Sources of a DeepSeek-V3 without the layers behind the last one."""
    def ahead(name):
        layer = re.match(r'model\.layers\.(\d+)\.', name)
        return layer and int(layer[1]) >= args['n_layer']
    return without_future(sources, where, ahead)


# ----------------------------------------------------------------------------------------------------------------------
# the families

ROTARY = dict(pos='rope', norm='rmsnorm', bias=False, qkv_bias=False, rope_theta_local=0.0, rope_pattern='R')
SILU = 'hidden_act', {'silu': 'swiglu', 'swish': 'swiglu'}


class Family(NamedTuple):
    """An architecture of transformers, by what it has in place of a Llama's or beside it; its names are in TABLES."""
    architecture: str
    sizes: dict  # {field: what transformers takes where config.json leaves its key out; 0: null}
    fields: dict = ROTARY  # {field: its value, [all that can leave, the first being that of a file] or ..., any}
    wants: Callable = lambda config: {}  # the same, where it depends on others: {field: [all that can leave]}
    read: Callable = lambda config, args: {}
    write: Callable = write_llama
    keys: dict = KEYS
    activation: tuple = SILU  # its key in config.json, and {its name there: our `mlp`}
    theta: float = 1e4  # rope_theta, where config.json leaves it out
    local_theta: tuple = ()  # rope_theta_local's key in older files and default, where it differs by the kind of layer
    rope: dict = {}  # the object of rotary parameters, where config.json leaves it out
    stretched: bool = True  # whether rope_scaling means the same in transformers
    window: int | None = None  # sliding_window, where config.json leaves it out; 0: null, None: no layer has one
    switched: bool = False  # only with use_sliding_window
    local: Callable | None = None  # (config.json, n_layer) -> for each layer whether it has the window; None: all have
    honoured: tuple = ()  # keys that others refuse, which are read here or have no meaning
    sources: Callable = lambda sources, args, where: sources  # of its files as those of the names in TABLES
    tensors: Callable = lambda tensors, config: tensors  # and the other way round, {name: tensor}
    joined: str = ''  # what keeps PEFT's names from being those of our LoRA

    def constants(self):
        """{field: value} of what every model of this family has, or most have."""
        mlp = next(iter(self.activation[1].values()))
        return {'mlp': mlp} | {field: value[0] if isinstance(value, list) else value
                               for field, value in self.fields.items() if value is not ...}


LLAMA_SIZES = dict(vocab_size=32000, block_size=2048, n_embd=4096, n_layer=32, n_head=32, n_kv_head=0, head_dim=0,
                   mlp_dim=11008, norm_eps=1e-6, tie_weights=False)
MISTRAL_SIZES = LLAMA_SIZES | dict(block_size=131072, n_kv_head=8, mlp_dim=14336)
OLMO_SIZES = LLAMA_SIZES | dict(vocab_size=50304, norm_eps=1e-5)
QWEN_SIZES = LLAMA_SIZES | dict(vocab_size=151936, block_size=32768, n_kv_head=32, mlp_dim=22016)
OLMO = ROTARY | dict(norm_place='output', qk_norm=True, qk_norm_joint=True)
FAMILIES = {  # by model_type
    'gpt2': Family(
        'GPT2LMHeadModel', dict(vocab_size=50257, block_size=1024, n_embd=768, n_layer=12, n_head=12, mlp_dim=0,
                                norm_eps=1e-5, tie_weights=True),
        dict(pos='learned', norm='layernorm', bias=True, norm_affine=True, qk_norm=False, window=0, n_expert=0,
             rope_scaling='none', rope_theta_local=0.0, rope_pattern='R'),
        gpt2_wants, write=write_gpt2, activation=('activation_function', {
            'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu': 'gelu'})),
    'llama': Family('LlamaForCausalLM', LLAMA_SIZES),
    'mistral': Family('MistralForCausalLM', MISTRAL_SIZES, write=write_mistral, window=4096),
    'qwen2': Family('Qwen2ForCausalLM', QWEN_SIZES, ROTARY | dict(qkv_bias=True), write=write_qwen,
                    window=4096, switched=True, local=upper_layers),
    'qwen3': Family('Qwen3ForCausalLM', QWEN_SIZES | dict(head_dim=128), ROTARY | dict(qk_norm=True), write=write_qwen,
                    window=4096, switched=True, local=upper_layers),
    'mixtral': Family(
        'MixtralForCausalLM', MISTRAL_SIZES | dict(norm_eps=1e-5, n_expert=8, n_expert_active=2, expert_dim=14336),
        wants=mixtral_wants, read=lambda config, args: {'router_renorm': renormalised(args, True)}, write=write_mistral,
        keys=SPARSE_KEYS, theta=1e6, window=0),
    'qwen3_moe': Family(
        'Qwen3MoeForCausalLM', QWEN_SIZES | dict(
            n_embd=2048, n_layer=24, n_kv_head=4, mlp_dim=6144, n_expert=128, n_expert_active=8, expert_dim=768),
        ROTARY | dict(qk_norm=True), read=read_qwen3_moe, write=write_qwen3_moe, window=4096, switched=True),
    'qwen3_next': Family(
        'Qwen3NextForCausalLM', QWEN_SIZES | dict(
            n_embd=2048, n_layer=48, n_head=16, n_kv_head=2, head_dim=256, mlp_dim=5632, n_expert=512,
            n_expert_active=10, expert_dim=512, delta_heads=32, delta_key_heads=16, delta_key_dim=128,
            delta_value_dim=128, delta_conv=4),
        ROTARY | dict(qk_norm=True, norm_offset=[True, False], attn_gate='element', layer_pattern=..., rotary_dim=...,
                      window=0),
        lambda config: {'n_expert_shared': [config.n_expert_shared or 1],
                        'expert_shared_gate': [True]} if config.n_expert else {},
        read_qwen3_next, write_qwen3_next, honoured=('partial_rotary_factor', 'layer_types'),
        sources=next_sources, tensors=next_tensors, joined='a Qwen3-Next has queries and gates in one matrix'),
    'gemma3_text': Family(
        'Gemma3ForCausalLM', LLAMA_SIZES | dict(
            vocab_size=262208, block_size=131072, n_embd=2304, n_layer=26, n_head=8, n_kv_head=4, head_dim=256,
            mlp_dim=9216, tie_weights=True),
        ROTARY | dict(norm_place='both', qk_norm=True, norm_offset=[True, False], rope_theta_local=...,
                      logit_softcap=...),
        gemma3_wants, read_gemma3, write_gemma3, activation=('hidden_activation', {'gelu_pytorch_tanh': 'geglu'}),
        theta=1e6, local_theta=('rope_local_base_freq', 1e4), window=4096,
        local=lambda config, n_layer: every_nth(n_layer, config.number('sliding_window_pattern', 6))),
    'olmo2': Family('Olmo2ForCausalLM', OLMO_SIZES, OLMO),
    'olmo3': Family(
        'Olmo3ForCausalLM', OLMO_SIZES, OLMO | dict(rope_theta_local=...),
        write=lambda config, values: write_mistral(config, values, by_kind=True) | layer_types(config), theta=5e5,
        local_theta=('rope_theta', 5e5), window=4096, local=lambda config, n_layer: every_nth(n_layer, 4)),
    'smollm3': Family(
        'SmolLM3ForCausalLM', LLAMA_SIZES | dict(
            vocab_size=128256, block_size=32768, n_embd=2048, n_layer=36, n_head=16, n_kv_head=4, tie_weights=True),
        ROTARY | dict(rope_pattern=...), read=read_smollm3, write=lambda config, values: write_llama(
            config, values, no_rope_layers=[int(config.rotates(i)) for i in range(config.n_layer)]), theta=2e6),
    'granite': Family('GraniteForCausalLM', LLAMA_SIZES, ROTARY | dict.fromkeys(MULTIPLIERS, ...), read=read_granite,
                      write=write_granite),
    'phi3': Family(
        'Phi3ForCausalLM', LLAMA_SIZES | dict(
            vocab_size=32064, block_size=4096, n_embd=3072, mlp_dim=8192, norm_eps=1e-5),
        stretched=False, window=0, honoured=('original_max_position_embeddings',), sources=gate_up_apart,
        joined='a Phi-3 has q, k, v and gate, up in one matrix each'),  # it leaves as a Llama or a Mistral
    'gpt_oss': Family(
        'GptOssForCausalLM', LLAMA_SIZES | dict(
            vocab_size=201088, block_size=131072, n_embd=2880, n_layer=36, n_head=64, n_kv_head=8, head_dim=64,
            mlp_dim=2880, norm_eps=1e-5, n_expert=128, n_expert_active=4, expert_dim=2880),
        ROTARY | dict(bias=[True, False], sink_logit=True, expert_bias=True, qk_norm=False, dense_layers=0,
                      expert_every=1),
        lambda config: {'n_expert': [config.n_expert or 8],
                        'router_renorm': ['always', True] if config.n_expert_active > 1 else ['always']},
        read_gpt_oss, write_gpt_oss, SPARSE_KEYS,
        ('hidden_act', {'silu': 'swiglu_clamped', 'swish': 'swiglu_clamped'}), theta=1.5e5,
        rope=dict(rope_type='yarn', factor=32.0, truncate=False, original_max_position_embeddings=4096), window=128,
        local=lambda config, n_layer: every_nth(n_layer, 2), honoured=('attention_bias', 'quantization_config'),
        sources=oss_experts, tensors=oss_tensors),
    'deepseek_v3': Family(
        'DeepseekV3ForCausalLM', LLAMA_SIZES | dict(
            vocab_size=129280, block_size=4096, n_embd=7168, n_layer=61, n_head=128, n_kv_head=128, head_dim=128,
            mlp_dim=18432, kv_lora_rank=512, q_lora_rank=1536, qk_rope_dim=64, v_head_dim=128, n_expert=256,
            n_expert_active=8, n_expert_shared=1, expert_dim=2048, dense_layers=3, router_groups=8,
            router_groups_active=4, router_scale=2.5),
        ROTARY | dict(window=0, qk_norm=False, q_lora_rank=..., qk_rope_dim=..., v_head_dim=...),
        deepseek_wants, read_deepseek, write_deepseek, LATENT_KEYS, honoured=('layer_types',),
        sources=deepseek_sources),
}


def hf_args(config):
    """config.json, read -> (model_type, fields of GPTConfig); UserError for the first key that we cannot honour."""
    named, name = config.get('architectures'), config.get('model_type')
    named = named[0] if isinstance(named, list) and named else None
    if name is None:
        name = next((key for key, family in FAMILIES.items() if family.architecture == named), None)
    if not isinstance(name, str) or name not in FAMILIES:
        config.refuse('model_type' if config.get('model_type') or not named else 'architectures',
                      f'is not one of {", ".join(FAMILIES)}')
    family = FAMILIES[name]
    trunk = re.sub('LMHeadModel|ForCausalLM', 'TextModel' if 'gemma' in name else 'Model', family.architecture)
    if named not in (None, family.architecture, trunk):
        config.refuse('architectures', f'is not {family.architecture}')
    for key, value in ONLY.items():
        if key not in family.honoured and config.get(key) not in (None, value):
            config.refuse(key)
    args = {}
    for field, default in family.sizes.items():
        key = next((k for k in family.keys[field] if k in config.values), family.keys[field][0])
        null = key in NULLABLE and config.get(key, default or None) is None
        args[field] = 0 if null else config.number(key, default, int(field != 'dense_layers'))
        if field in ('n_layer', 'n_expert') and args[field] > 10_000:
            config.refuse(key, 'is impossible')
    key, kinds = family.activation
    kind = str(config.get(key, next(iter(kinds))))
    if kind not in kinds:
        config.refuse(key)
    args |= family.constants() | {'mlp': kinds[kind]}
    if args['pos'] == 'rope':
        args |= rope_args(config, family, args['block_size'])
    if args['pos'] == 'rope' and 'layer_types' not in family.honoured:
        args |= window_args(config, family, args['n_layer'])
    return name, args | family.read(config, args)


def hf_config(config, family):
    """A GPTConfig that `hf_family` has found a family for -> the values of config.json."""
    own = -1 if family == 'gpt2' else 0  # of two spellings the last is GPT-2's
    family = FAMILIES[family]
    return family.write(config, {family.keys[field][own]: getattr(config, field) for field in family.sizes})


TRAINING = {'dropout', 'init_std', 'zero_init', 'router_aux', 'router_z'}  # do not change what a trained model computes
EXPERTS = {'n_expert_shared', 'router_bias_rate', 'router_score', 'router_scale'}  # nor do these without experts
FREE = {*TRAINING, *KEYS, 'qkv_bias', 'qk_norm', 'norm_affine', 'window', 'window_pattern', 'dense_layers',
        'expert_every', 'n_future', 'router_renorm'}


def hf_family(config, gguf=False):
    """The model_type that computes what a GPTConfig says; UserError names all fields that none has, and what would do.

    gguf: that computes it in llama.cpp, too, which has GPT-2 with one GELU, no windows but Gemma 3's, and experts in
    one way.
    """
    names = ['gpt2', rotary_family(config, gguf), *(() if gguf else ('gpt_oss', 'deepseek_v3', 'qwen3_next'))]
    found = {name: lacking(config, name, gguf) for name in names}
    family = min(names, key=lambda name: len(found[name]))
    if remedies := found[family]:
        fields = ', '.join(f'{name}={getattr(config, name)!r}' for name in remedies)
        flags = ' '.join(f'--{name}={value}' for name, value in remedies.items())
        raise UserError(f'{fields} cannot be exported: the nearest architecture there would need a model that was '
                        f'trained with {flags}')
    return family


def rotary_family(config, gguf):
    """That of the families like Llama that is nearest to a GPTConfig."""
    windowed = any(local_layers(config))
    if config.n_expert:
        return 'qwen3_moe' if config.qk_norm else 'mixtral'
    if config.norm_place == 'both' or config.mlp == 'geglu':
        return 'gemma3_text'
    if config.norm_place == 'output' and not gguf:
        return 'olmo3' if windowed else 'olmo2'
    if config.qk_norm or config.qkv_bias:
        return 'qwen3' if config.qk_norm else 'qwen2'
    if 'N' in config.rope_pattern and not gguf:
        return 'smollm3'
    if (config.embed_scale, config.attn_scale, config.residual_scale, config.logit_scale) != (1, 0, 1, 1) and not gguf:
        return 'granite'
    # without a window a Mistral is a Llama, but free in the width of a head
    return 'mistral' if windowed or config.n_embd % config.n_head else 'llama'


def lacking(config, name, gguf):
    """{field: a value that would do} of the fields of a GPTConfig that a family, named, cannot have as they are.

    A field that the family says nothing of must stand at its default, where that changes what a trained model computes.
    """
    family, local, remedies = FAMILIES[name], local_layers(config), {}
    wants = family.wants(config)
    if family.local_theta and any(local) and config.rope_scaling != 'none' and not config.rope_theta_local:
        wants['rope_theta_local'] = [config.rope_theta]  # which nothing stretches
    if gguf:
        wants |= llama_cpp_wants(config, name)
    elif any(local) and family.window is None:
        wants['window'] = [0]
    elif any(local) and not all(local) and not family.local:
        wants['window_pattern'] = ['L']
    known = {'mlp': [*family.activation[1].values()]} | family.fields
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        free = field.name in FREE or field.name.startswith('rope_') or field.name in EXPERTS and not config.n_expert
        fit = known.get(field.name, ... if free or field.name in wants else field.default)
        fit = fit if isinstance(fit, list) else [value if fit is ... else fit]
        if value not in fit:
            remedies[field.name] = fit[0]
    return remedies | {name: fit[0] for name, fit in wants.items() if getattr(config, name) not in fit}


def llama_cpp_wants(config, family):
    """As Family.wants, what llama.cpp has no key for."""
    local, wants = local_layers(config), {}
    if family == 'gpt2':
        wants['mlp'] = ['gelu_tanh']
    if family == 'qwen2':
        wants['head_dim'] = [config.n_embd // config.n_head]
    if config.n_expert:
        wants |= mixtral_wants(config)
    if config.rope_scaling == 'yarn':  # of which it reads no more for these architectures
        wants |= {'rope_low': [1.0], 'rope_high': [32.0], 'rope_truncate': [True], 'rope_mscale': [0.0]}
    if family == 'gemma3_text':  # what it has are numbers of its own
        wants |= {'attn_scale': [0.0], 'logit_softcap': [0.0]}
        if any(local):
            wants['rope_theta_local'] = [1e4]
        if any(local) and local != every_nth(config.n_layer, 6):
            wants['window_pattern'] = ['LLLLLG']
        if config.rope_scaling not in ('none', 'linear'):
            wants['rope_scaling'] = ['none']
        if config.n_layer == 62:  # by which it knows the one whose attention has another scale
            wants['n_layer'] = [61]
    elif any(local) and config.window < config.block_size:
        wants['window'] = [0]
    return wants


# ----------------------------------------------------------------------------------------------------------------------
# Hugging Face directories

def safetensors_of(folder, name='model.safetensors'):  # noqa: C901
    """{name: (file, shape, read)} of the tensors of a directory, sharded or not; UserError for a damaged one."""
    single, index = folder / name, folder / f'{name}.index.json'
    if single.is_file():
        of, files = None, [single]
    elif index.is_file():
        of = read_json(index).get('weight_map')
        if not isinstance(of, dict) or not of or not all(
                isinstance(f, str) and f == os.path.basename(f) and f.endswith('.safetensors') for f in of.values()):
            raise UserError(f"{index}: its 'weight_map' must map the names of tensors to .safetensors files beside it")
        files = [folder / name for name in sorted(set(of.values()))]
    elif any(folder.glob('pytorch_model*.bin')):
        raise UserError(f'{folder}: only a pickle (pytorch_model.bin), which could run code; write safetensors with '
                        'transformers: AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)')
    else:
        raise UserError(f'{folder}: no {single.name} in this directory')
    from safetensors import safe_open
    tensors = {}
    for file in files:
        try:
            opened = safe_open(file, 'pt')
            for name in opened.keys():
                if of is None or of.get(name) == file.name:
                    part = opened.get_slice(name)
                    bits_4 = part.get_dtype() == 'U8' and name.endswith(('_blocks', '_scales'))
                    if part.get_dtype() not in ('F32', 'F16', 'BF16') and not bits_4:
                        raise UserError(f'{file}: tensor {name} has dtype {part.get_dtype()}, not F32, F16 or BF16')
                    tensors[name] = file, part.get_shape(), functools.partial(opened.get_tensor, name)
        except UserError:
            raise
        except FileNotFoundError:
            raise UserError(f'{file}: no such file, but {index.name} names it') from None
        except Exception as error:
            raise UserError(f'{file}: not a whole safetensors file ({reason_of(error)})') from None
    lost = next((name for name in of or () if name not in tensors), None)
    if lost:
        raise UserError(f'{folder / of[lost]}: tensor {lost} is missing, but {index.name} names it')
    return tensors


WRAPPERS = re.compile(  # what torch.compile, FSDP, activation checkpointing, DDP and PEFT put into names, or a wrapper
    r'(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|'
    r'^(module|base_model\.model|model(?=\.(model|transformer|lm_head)\.))\.')


def unwrapped(tensors, where):
    """Tensors {name: …} by their names without `WRAPPERS`, which a line on stderr names; UserError where two meet."""
    found, plain = set(), {}
    for name, tensor in tensors.items():
        short = name
        while match := WRAPPERS.search(short):
            found.add(match[0])
            short = short[:match.start()] + short[match.end():]
        if short in plain:
            raise UserError(f'{where}: tensor {name} is there twice, with and without {", ".join(sorted(found))}')
        plain[short] = tensor
    if found:
        print(f'{where}: the names of its tensors are read without {", ".join(sorted(found))}', file=sys.stderr)
    return plain


BUFFERS = re.compile(r'rotary_emb\.inv_freq$|(^|\.)h\.\d+\.attn\.(masked_)?bias$')  # not weights; older files have them


def from_hf(directory, dtype=torch.float32, **overrides):
    """A Hugging Face directory -> (model, tokenizer), the latter None without tokenizer.json.

    dtype: of the parameters; None keeps the file's. overrides: fields of GPTConfig; a smaller block_size cuts a table
    of learned positions. Raises UserError with one line for what is missing, damaged or not supported.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise UserError(f'{folder}: no such directory')
    family, args = hf_args(read_json(folder / 'config.json'))
    sources = {name: t for name, t in unwrapped(safetensors_of(folder), folder).items() if not BUFFERS.search(name)}
    if wrapped := next((name for name in sources if '.lora_' in name or '.base_layer.' in name), None):
        raise UserError(f'{folder}: tensor {wrapped} is of a model with LoRA beside it: {PEFT_MERGE}')
    sources = FAMILIES[family].sources(sources, args, folder)
    embedding, positions = TABLES[family]['tok_emb'] + '.weight', 'transformer.wpe.weight'
    prefix = embedding.split('.')[0] + '.'
    if not any(name.startswith(prefix) for name in sources):  # saved without the head's class
        sources = {name if name == 'lm_head.weight' else prefix + name: t for name, t in sources.items()}
    if args['tie_weights'] and {'lm_head.weight', embedding} <= sources.keys():
        if not torch.equal(read_tensor(sources, 'lm_head.weight'), read_tensor(sources, embedding)):
            raise UserError(f'{folder}: tensor lm_head.weight differs from {embedding}, but tie_word_embeddings=True')
        del sources['lm_head.weight']
    elif args['tie_weights'] and 'lm_head.weight' in sources:  # as some writers keep the one tensor of both
        sources[embedding] = sources.pop('lm_head.weight')
    elif embedding in sources and 'lm_head.weight' not in sources and not (args | overrides)['tie_weights']:
        raise UserError(f'{folder}: tensor lm_head.weight is missing: if {embedding} is the head, too, write '
                        '"tie_word_embeddings": true into config.json')
    rows = overrides.get('block_size', args['block_size'])
    if positions in sources and rows < args['block_size']:
        file, shape, read = sources[positions]
        sources[positions] = file, [*(min(rows, n) for n in shape[:1]), *shape[1:]], lambda: read()[:rows]
    if dtype is None:  # that holds every parameter of the files, bit for bit; DeepSeek's biases of a choice are none
        dtypes = {read_tensor(sources, name).dtype for name in sources if not name.endswith('correction_bias')}
        dtype = functools.reduce(torch.promote_types, dtypes)
    tokenizer = tokenizers.hf_tokenizer(folder) if (folder / 'tokenizer.json').is_file() else None
    model = build(args, overrides, family, sources, dtype, folder)
    return model, fits(tokenizer, model, folder)


def _vacant(directory):
    """Raises UserError where a directory that is to be written has something in it."""
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise UserError(f'{directory}: already exists and is not empty; give a new directory')


def tensors_of(model, family):
    """Yields (their name, tensor) of a GPT by a family's table; a norm without weights gets what changes nothing.

    UserError for a model with LoRA or adapters in it.
    """
    config, state = model.config, runtime.full_state(model.state_dict())
    for name in ('lora_rank', 'adapter_dim', 'quant'):
        if value := getattr(lora.config_of(model), name):
            raise UserError(f'{name}={value!r} cannot be exported: fold LoRA in; no architecture there has adapters')
    with on_meta():
        # a family that has biases of a choice has them, 0, where none are learned, too
        rate = config.router_bias_rate or float('blocks.#.mlp.choice_bias*' in TABLES[family])
        whole = GPT(dataclasses.replace(config, norm_affine=True, n_future=0, router_bias_rate=rate)).state_dict()
    there = family in FAMILIES and 'norm_offset' in FAMILIES[family].fields
    more = config.norm_offset - there  # a norm's weight is 1 + w here, or there
    for name, like in whole.items():
        if name != 'head.weight' or not config.tie_weights:
            usual = torch.zeros(like.shape) if name.endswith('choice_bias') else torch.ones(
                like.shape, dtype=model.tok_emb.weight.dtype)
            tensor = state.get(name, usual)
            if more and 'norm' in name and not name.endswith('attn.norm.weight'):
                tensor = (tensor.float() + more).to(torch.float32 if 'gguf' in family else tensor.dtype)
            yield from parts(name, tensor, config, family)


def say_what_is_left_out(config):
    if config.n_future:
        print(f'n_future={config.n_future}: the further heads are left out, which no architecture there has',
              file=sys.stderr)


def to_hf(model, directory, tokenizer=None, card=None):
    """Writes a directory that transformers reads: config.json, model.safetensors, tokenizer.json. All or nothing.

    card: the text of its README.md (see card.py). The tensors keep their dtype, bit for bit. Raises UserError
    for a field that no architecture there has, a directory that is not empty, a disk that fails.
    """
    directory, config = Path(directory), model.config
    _vacant(directory)
    fits(tokenizer, model, directory)
    family = hf_family(config)
    say_what_is_left_out(config)
    ends = list(tokenizer.turn_ids) if tokenizer else []  # an exported chat model must stop, too
    dtype = model.tok_emb.weight.dtype
    name_of_dtype = str(dtype).removeprefix('torch.')
    values = hf_config(config, family) | {
        'architectures': [FAMILIES[family].architecture], 'model_type': family, 'torch_dtype': name_of_dtype,
        'dtype': name_of_dtype, 'bos_token_id': tokenizer and tokenizer.bos, 'pad_token_id': None,
        'eos_token_id': ends[0] if len(ends) == 1 else ends or None}
    tensors = {name: part.detach().cpu().contiguous() for name, part in tensors_of(model, family)}
    tensors = FAMILIES[family].tensors(tensors, config)

    def write(folder):
        from safetensors.torch import save_file
        save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})
        if tokenizer:
            tokenizer.to_hf(folder)
        _write_json(folder / 'config.json', values)
        generation = {key: values[key] for key in ('bos_token_id', 'eos_token_id') if values[key] is not None}
        if own := getattr(tokenizer, 'config', {}).get('sampling'):
            generation |= {'do_sample': True} | own
        if generation:
            _write_json(folder / 'generation_config.json', generation)
        if card:
            runtime.write_atomic(folder / 'README.md', lambda file: file.write(card.encode()))
    _write_directory(directory, write)


def _write_json(path, values):
    text = json.dumps(values, indent=2) + '\n'
    runtime.write_atomic(path, lambda file: file.write(text.encode()))


def _write_directory(directory, write):
    """Calls write(folder) for a new folder, flushes its files and gives it the directory's name; UserError if not."""
    temporary = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f'.{directory.name}.', suffix='.tmp', dir=directory.parent))
        write(temporary)
        mode = next(temporary.glob('*config.json')).stat().st_mode & 0o666  # as the umask has it
        for path in temporary.iterdir():
            path.chmod(mode)
            with open(path, 'rb+') as file:
                os.fsync(file.fileno())
        temporary.chmod(mode | (mode & 0o444) >> 2)
        with contextlib.suppress(FileNotFoundError):
            directory.rmdir()  # it may be there, empty: only POSIX renames onto that
        os.rename(temporary, directory)
    except UserError:
        raise
    except Exception as error:  # safetensors has its own word for a full disk
        raise UserError(f'{directory}: not written ({getattr(error, "strerror", None) or reason_of(error)})') from None
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------------------------
# PEFT

class PeftModule:
    """A module of ours with LoRA: name, module (on 'meta'), and theirs: {part: the name of the module it is in there}.

    fused: theirs holds all parts in one matrix, as GPT-2's c_attn does, and so has one A for all.
    """

    def __init__(self, name, module, config, family):
        matrix = torch.empty(module.out_features, module.in_features, device='meta')
        theirs = [theirs.removesuffix('.weight') for theirs, _ in parts(f'{name}.weight', matrix, config, family)]
        self.name, self.module, self.fused = name, module, len(theirs) < len(module.parts)
        theirs = theirs * len(module.parts) if self.fused else theirs
        self.theirs = {part: t for (part, (_, learns)), t in zip(module.parts.items(), theirs, strict=True) if learns}


def _peft_modules(config, lora_config, tensors):
    """The PeftModules of a model with LoRA, its small tensors in place where given; UserError where no family fits."""
    if lora_config.adapter_dim:
        raise UserError(f'adapter_dim={lora_config.adapter_dim} cannot be exported: no architecture there has it')
    family = hf_family(config)
    if joined := FAMILIES[family].joined:
        raise UserError(NOT_PEFT.format(joined))
    with on_meta():
        model = lora.apply(GPT(config), dataclasses.replace(lora_config, quant=''))
    with runtime.user_errors():
        check_tensors(lora.state(model) if tensors else {}, tensors)
    model.load_state_dict(tensors, strict=False, assign=True)
    return [PeftModule(name, module, config, family) for name, module in model.named_modules()
            if isinstance(module, LoRALinear) and module.lora_a is not None], family


def _as_state(model_or_state):
    if not isinstance(model_or_state, GPT):
        return model_or_state
    return {'model': model_or_state.state_dict(), 'model_args': dataclasses.asdict(model_or_state.config),
            'lora_args': dataclasses.asdict(lora.config_of(model_or_state))}


def to_peft(model_or_state, directory, base_name, tokenizer=None):  # noqa: C901
    """Writes adapter_config.json and adapter_model.safetensors, which PEFT loads onto base_name. All or nothing.

    model_or_state: a GPT with LoRA, or a state of one, which need not hold the base. GPT-2 has queries, keys and values
    in one matrix: their updates become one of all their ranks together, with zeros where one would meet another's A.
    Of a model with DoRA, or with rows that learn, for tokens that were added, the state must hold the base. tokenizer:
    that with these tokens, to be written beside it. Raises UserError for a model that no family has, and as `to_hf`.
    """
    directory, state = Path(directory), _as_state(model_or_state)
    _vacant(directory)
    there = Path(base_name) / 'config.json'
    if there.is_file() and read_json(there).get('model_type') == 'phi3':  # whose state here is that of a Llama
        raise UserError(f'{base_name}: {NOT_PEFT.format(FAMILIES["phi3"].joined)}')
    with runtime.user_errors(directory):
        config, added = GPTConfig(**state['model_args']), LoRAConfig(**state.get('lora_args', {}))
    if not added.lora_rank:
        raise UserError(f'{directory}: lora_rank=0: the model has no LoRA that could be exported')
    small = {k: v for k, v in state['model'].items() if '.lora_' in k}
    modules, family = _peft_modules(config, added, small)
    rank, alpha, tensors, ranks, alphas = added.lora_rank, added.lora_alpha, {}, {}, {}
    for m in modules:
        module, rows = m.module, m.module.learned
        found = {'A.weight': module.lora_a, 'B.weight': module.lora_b.split(rows)}
        if added.lora_dora:
            found['magnitude_vector'] = module.lora_magnitude.split(rows)
        if m.fused:
            theirs, n = next(iter(m.theirs.values())), len(m.theirs)
            found |= {'A.weight': [module.lora_a.flatten(0, 1)], 'B.weight': [module.expand()]}
            if added.lora_dora:
                found['magnitude_vector'] = [module.magnitudes(state['model'][f'{m.name}.weight'].float().norm(dim=1))]
            ranks[theirs.rpartition('.')[2]] = n * rank
            alphas[theirs.rpartition('.')[2]] = alpha * (math.sqrt(n) if added.lora_rs else n)
        for kind, of_each in found.items():
            for theirs, tensor in zip(dict.fromkeys(m.theirs.values()), of_each, strict=True):
                tensors[f'{PEFT}{theirs}.lora_{kind}'] = tensor
    names = sorted({t for m in modules for t in m.theirs.values()})
    if config.n_expert and any('.mlp.' in name for name in names):
        raise UserError(f'{directory}: lora_targets={added.lora_targets!r}: beside experts PEFT takes gate, up and '
                        'down of dense layers for theirs: export without --peft, or train with '
                        '--lora_targets=q,k,v,proj')
    names = sorted({re.split(r'\.\d+\.', name)[-1] for name in names})
    values = {'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'base_model_name_or_path': HUB.get(base_name, base_name),
              'r': rank, 'lora_alpha': alpha, 'lora_dropout': added.lora_dropout, 'use_rslora': added.lora_rs,
              'use_dora': added.lora_dora, 'target_modules': names, 'rank_pattern': ranks, 'alpha_pattern': alphas,
              'bias': 'none', 'fan_in_fan_out': family == 'gpt2', 'inference_mode': True}
    if first := added.lora_rows_from:
        found = [name for name in ROWS if f'{name}.lora_rows' in small]
        for name in found:
            tensors[_rows_name(name, family)] = _mean_row(state['model'], name, first) + small[f'{name}.lora_rows']
        values['trainable_token_indices'] = {TABLES[family][name].rpartition('.')[2]: [*range(first, config.vocab_size)]
                                             for name in found}

    def write(folder):
        from safetensors.torch import save_file
        save_file({name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()},
                  folder / 'adapter_model.safetensors', metadata={'format': 'pt'})
        if tokenizer:
            tokenizer.to_hf(folder)
        _write_json(folder / 'adapter_config.json', values)
    _write_directory(directory, write)


PEFT = 'base_model.model.'  # before every name in its files
ROWS = ('tok_emb', 'head')  # what may have rows of tokens that were added


def _rows_name(name, family):
    return f'{PEFT}{TABLES[family][name]}.token_adapter.trainable_tokens_delta'


def _mean_row(tensors, name, first):
    """What rows of added tokens begin with, see `load.with_new_rows`: (C,) float32."""
    return tensors[f'{name}.weight'][:first].float().mean(0)


def _rows_of_peft(settings, base, sources, family):
    """The rows of tokens that a PEFT directory has trained -> (first id, {name: lora_rows}, the model's vocab_size)."""
    given, old = settings.get('trainable_token_indices'), base['model_args']['vocab_size']
    names = {TABLES[family][name].rpartition('.')[2]: name for name in ROWS if f'{name}.weight' in base['model']}
    given = {next(iter(names)): given} if isinstance(given, list) else given
    if not isinstance(given, dict) or not given.keys() <= names.keys() or not all(
            isinstance(ids, list) and ids and all(type(i) is int and 0 < i < 1 << 24 for i in ids)
            for ids in given.values()):
        settings.refuse('trainable_token_indices', f'must be lists of ids of {", ".join(names)}')
    first, end = min(min(ids) for ids in given.values()), max(max(ids) for ids in given.values()) + 1
    rows = {}
    for theirs, name in names.items():
        if name == 'head' and base['model_args'].get('tie_weights', True):
            continue
        weight = base['model'][f'{name}.weight'].float()
        table, ids = torch.zeros(max(old, end), weight.shape[1]), given.get(theirs, [])
        if ids:
            tensor = _rows_name(name, family)
            if tensor not in sources or tuple(sources[tensor][1]) != (len(ids), weight.shape[1]):
                raise UserError(f'{settings.where}: no tensor {tensor} of {len(ids)} rows')
            table[ids] = read_tensor(sources, tensor).float()
        if missing := sorted({*range(old, end)} - {*ids}):
            settings.refuse('trainable_token_indices', f'has no row of {theirs} for the added token {missing[0]}')
        known = [i for i in range(first, old) if i not in set(ids)]
        table[known] = weight[known]
        rows[f'{name}.lora_rows'] = table[first:] - _mean_row(base['model'], name, first)
    return first, rows, len(table)


PEFT_READ = {'peft_type', 'r', 'lora_alpha', 'lora_dropout', 'use_rslora', 'use_dora', 'init_lora_weights',
             'base_model_name_or_path', 'trainable_token_indices'}
PEFT_IDLE = {'task_type', 'target_modules', 'exclude_modules', 'fan_in_fan_out', 'inference_mode', 'peft_version',
             'revision', 'auto_mapping', 'megatron_core', 'qalora_group_size', 'library_name'}  # change no number here
PEFT_WHY = {
    'bias': 'biases were trained, too',
    'layers_to_transform': 'only some layers have LoRA', 'layers_pattern': 'only some layers have LoRA',
    'rank_pattern': 'the rank is not everywhere the same', 'alpha_pattern': 'the scale is not everywhere the same',
    'modules_to_save': 'whole modules were trained, too',
    'target_parameters': 'experts were trained, too'}
NOT_PEFT = "{}, which PEFT's names of this LoRA are not of: export without --peft"
PEFT_MERGE = 'let PEFT merge it, model.merge_and_unload().save_pretrained(…), and give that directory'


def _check_peft_targets(config, base, modules, family):
    """UserError where target_modules of an adapter_config.json, read, has of a base's modules others than PeftModules,
    or those of some layers alone."""
    def named(name, wanted):
        if isinstance(wanted, str):
            return re.fullmatch(wanted, name)
        return any(name == end or name.endswith(f'.{end}') for end in wanted or ())

    def refuse(why):
        config.refuse('target_modules', f'is not supported ({why}): {PEFT_MERGE}')
    part_of = {theirs: part for m in modules for part, theirs in m.theirs.items()}
    with on_meta():
        own = GPT(base).state_dict()
    every = {theirs.rpartition('.')[0] for name, like in own.items() for theirs, _ in parts(name, like, base, family)}
    wanted, unwanted = config.get('target_modules'), config.get('exclude_modules')
    if wanted in (None, 'all-linear'):
        return
    try:
        found = {name for name in every if named(name, wanted) and not named(name, unwanted)}
    except (re.error, TypeError):
        config.refuse('exclude_modules' if unwanted else 'target_modules', 'is neither a list of names nor a pattern')
    if not found:
        refuse('this model has none of them')
    if strange := sorted(found - part_of.keys()):
        refuse(f'{strange[0]} cannot have LoRA here')
    for name in sorted(part_of.keys() - found):
        if part_of[name] in {part_of[other] for other in found}:
            refuse(f'only some layers have LoRA: {name} has none')


def from_peft(directory, base):
    """The LoRA of a PEFT directory on a base, a GPT or a state of one -> a state with both, and lora_args to match.

    Raises UserError with one line for what is missing or damaged, and by its key for what would be computed otherwise:
    ranks by a pattern, biases, whole modules …
    """
    directory, base = Path(directory), _as_state(base)
    config = read_json(directory / 'adapter_config.json')
    if config.get('peft_type') != 'LORA':
        config.refuse('peft_type', "is not 'LORA'")
    if config.get('init_lora_weights', True) not in (True, False, None, 'gaussian', 'eva', 'orthogonal'):
        config.refuse('init_lora_weights', 'has changed the base too')
    for key, value in config.values.items():
        if (value or type(value) is int) and key not in PEFT_READ | PEFT_IDLE and (key, value) != ('bias', 'none'):
            why = f' ({PEFT_WHY[key]})' if key in PEFT_WHY else ''
            config.refuse(key, f'is not supported{why}: {PEFT_MERGE}')
    args = {
        'lora_rank': config.number('r', 8), 'lora_alpha': config.number('lora_alpha', 8.0),
        'lora_dropout': config.get('lora_dropout') and config.number('lora_dropout', 0.0) or 0.0,
        'lora_rs': config.number('use_rslora', False), 'lora_dora': config.number('use_dora', False)}
    where = directory / 'adapter_model.safetensors'
    with runtime.user_errors(directory):
        settings, config = config, GPTConfig(**base['model_args'])
        modules, family = _peft_modules(config, LoRAConfig(**args), {})
        _check_peft_targets(settings, config, modules, family)
        sources = safetensors_of(directory, where.name)
        targets = {part for m in modules for part, t in m.theirs.items() if f'{PEFT}{t}.lora_A.weight' in sources}
        args['lora_targets'] = ','.join(part for part in lora.TARGETS if part in targets)
        modules, _ = _peft_modules(config, LoRAConfig(**args), {})
    tensors, left = {}, set(sources)
    if settings.get('trainable_token_indices'):
        args['lora_rows_from'], tensors, vocab_size = _rows_of_peft(settings, base, sources, family)
        base = base | {'model_args': base['model_args'] | {'vocab_size': vocab_size}}
        left -= {_rows_name(name, family) for name in ROWS}

    def read(theirs, kind, shape):
        name = f'{PEFT}{theirs}.lora_{kind}'
        if name not in sources:
            raise UserError(f'{where}: tensor {name} is missing')
        if tuple(sources[name][1]) != shape:
            raise UserError(f'{where}: tensor {name} has shape {tuple(sources[name][1])}, not {shape}')
        left.discard(name)
        tensor = torch.empty(shape)
        _fill(tensor, sources, name)
        return tensor
    for m in modules:
        _, rank, n_in = m.module.lora_a.shape
        theirs, rows = list(m.theirs.values()), m.module.learned
        tensors[f'{m.name}.lora_a'] = torch.stack([read(t, 'A.weight', (rank, n_in)) for t in theirs])
        theirs, rows = (theirs[:1], [sum(rows)]) if m.fused else (theirs, rows)
        theirs = list(zip(theirs, rows, strict=True))
        tensors[f'{m.name}.lora_b'] = torch.cat([read(t, 'B.weight', (n, rank)) for t, n in theirs])
        if args['lora_dora']:
            tensors[f'{m.name}.lora_magnitude'] = torch.cat([read(t, 'magnitude_vector', (n,)) for t, n in theirs])
    if left:
        raise UserError(f'{where}: tensor {sorted(left)[0]} is not part of LoRA on this model: {PEFT_MERGE}')
    return base | {'model': base['model'] | tensors, 'lora_args': args}


NEVER_EXPORTED = ('--mlp=relu2 --pos=sinusoidal --pos=none --norm_place=post --causal=False --n_encoder_layer '
                  '--attn_gate=head --n_sink')  # what no family has, whatever else a model has


def options(argv):
    """Arguments -> (source, target, whether --peft is given, --type or None); exits with the help where they ask."""
    names, peft, kind = [], False, None
    for arg in argv:
        key, _, value = arg.partition('=')
        if arg in ('-h', '--help'):
            print(f'{__doc__.strip()}\n\nCannot be exported, whatever the other flags (docs/data.md has all):\n  '
                  f'{NEVER_EXPORTED}')
            raise SystemExit(0)
        if arg == '--peft':
            peft = True
        elif key == '--type' and value in ('f32', 'f16', 'bf16', 'q8_0'):
            kind = value
        elif key == '--type':
            raise UserError(f'--type={value}: give one of f32, f16, bf16, q8_0')
        elif arg.startswith('-'):
            raise UserError(f'unknown option {arg!r}; {runtime.suggest(arg, ["--peft", "--type=f16", "--help"])}')
        else:
            names.append(arg)
    if len(names) != 2:
        print(__doc__.strip())
        raise SystemExit(2)
    if names[1].endswith('.gguf') and peft or peft and kind or kind == 'q8_0' and not names[1].endswith('.gguf'):
        raise UserError(f'{names[1]}: --peft is for a directory, without --type; --type=q8_0 is for a target NAME.gguf')
    return names[0], Path(names[1]), peft, kind


def main():
    import card  # these import this file
    import gguf_format
    import load

    source, target, peft, kind = options(sys.argv[1:])
    if target.suffix == '.gguf':
        gguf_format.vacant_file(target)
        model, tokenizer = load.load_model(source)
        gguf_format.to_gguf(model, target, tokenizer, kind or 'f16', card.gguf_about(source))
        print(f'{source} -> {target} ({kind or "f16"})')
        return
    _vacant(target)
    if peft:
        state = load.read_checkpoint(source)
        if 'score_args' in state:
            raise UserError(load.NO_WRITER.format(source))
        base = state['base']['init_from'] if 'base' in state else source
        args = state.get('lora_args', {})
        if args.get('lora_rows_from') or args.get('lora_dora'):
            state = load.complete(state, source)
        if first := args.get('lora_rows_from'):
            tokenizer = tokenizers.Tokenizer.from_dict(state['tokenizer'])
            to_peft(state, target, base, tokenizer)
            print(f'it has rows of its own for tokens from {first} on: before PeftModel.from_pretrained, '
                  f'model.resize_token_embeddings({state["model_args"]["vocab_size"]})')
        else:
            to_peft(state, target, base)
        if load.is_run(base):
            print(f"its base {base} is a run: export that too, and name it in adapter_config.json's "
                  'base_model_name_or_path')
    elif load.is_run(source):
        model, tokenizer = load.load_model(source)
        if kind:
            model.to({'f16': torch.float16, 'bf16': torch.bfloat16, 'f32': torch.float32}[kind])
        if kind == 'f16' and not all(p.isfinite().all() for p in model.parameters()):
            raise UserError(f'{source}: it has values that f16 cannot hold: give --type=bf16')
        to_hf(model, target, tokenizer, card.model_card(source, target.name, model))
    elif kind:
        raise UserError(f'--type={kind}: {source} becomes a run, which keeps the dtype that it has')
    else:
        state = load.load_state(source) | {'converted_from': source}
        try:
            target.mkdir(parents=True, exist_ok=True)
            runtime.save_checkpoint(target / 'ckpt.pt', state)
        except OSError as error:
            raise UserError(f'{target}: not written ({error.strerror})') from None
    print(f'{source} -> {target}')


if __name__ == '__main__':
    runtime.cli(main)
