"""
GGUF, the one file of llama.cpp, ollama, LM Studio …: weights, tokenizer and chat template, both ways.

    python convert.py out/sft mine.gguf [--type=f16]   a run, a Hugging Face directory, a name, another .gguf -> GGUF
    python convert.py mine.gguf out/name               and back

Names, shapes and the order of rows are those of llama.cpp's converter: of arch 'llama' the pairs of queries and keys
that rotate lie side by side. What llama.cpp would compute otherwise is refused by the name of its field, and in a file
of others by its key.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""
import contextlib
import json
import math
from pathlib import Path

import runtime

import numpy as np
import torch

import tokenizer as tokenizers
from convert import (
    FAMILIES,
    Json,
    build,
    fits,
    hf_family,
    read_tensor,
    reason_of,
    renormalised,
    say_what_is_left_out,
    tensors_of,
)
from model import GPTConfig, frequencies, rope_frequencies
from tokenizer import UserError

ARCHITECTURES = {'llama': 'llama', 'mistral': 'llama', 'mixtral': 'llama', 'qwen2': 'qwen2', 'qwen3': 'qwen3',
                 'qwen3_moe': 'qwen3moe', 'gemma3_text': 'gemma3', 'gpt2': 'gpt2'}  # by the families of convert.py
TYPES = {'f32': 0, 'f16': 1, 'q8_0': 7, 'bf16': 32}  # general.file_type


def package(path):
    """The package gguf; UserError where it is missing."""
    try:
        import gguf
    except ImportError:
        raise UserError(f'{path}: GGUF needs the package gguf: pip install gguf') from None
    return gguf


# ----------------------------------------------------------------------------------------------------------------------
# reading

def from_gguf(path, dtype=torch.float32, **overrides):
    """A GGUF file of one of ARCHITECTURES, whatever its quantisation -> (model, tokenizer), the weights dequantised.

    Raises UserError with one line for a file that is damaged or of another architecture.
    """
    gguf, fields, tensors = read_gguf(path)
    args = gguf_args(Json(fields, path))
    arch = fields['general.architecture']
    heads = {'attn_q': args['n_head'], 'attn_k': args.get('n_kv_head') or args['n_head']} if arch == 'llama' else {}

    def reader_of(name, tensor, shape):
        def read():
            weights = gguf.dequantize(tensor.data, tensor.tensor_type)  # of float32 only a view of the file
            weights = torch.from_numpy(np.require(weights, requirements='W')).view(shape)
            n = heads.get(name.split('.')[-2])
            # pairs that rotate lie side by side there
            return weights.view(n, -1, 2, *shape[1:]).transpose(1, 2).reshape(shape) if n else weights
        return path, shape, read

    sources = {name: reader_of(name, tensor, shape) for name, (tensor, shape) in tensors.items()}
    if (freqs := 'rope_freqs.weight') in sources and arch != 'gpt2':
        original = fields.get(f'{arch}.rope.scaling.original_context_length', 8192)
        scaling = llama3_scaling(read_tensor(sources, freqs).numpy(), args, original)
        if scaling is None or scaling and 'rope_scaling' in args:
            raise UserError(f"{path}: tensor {freqs} does not stretch wavelengths as Llama 3's do")
        args |= scaling
        del sources[freqs]
    args['tie_weights'] = 'output.weight' not in sources
    if len(sources.get('token_embd.weight', (0, ()))[1]) == 2:
        args['vocab_size'] = sources['token_embd.weight'][1][0]
    with runtime.user_errors(path):
        tokenizer = tokenizers.gguf_tokenizer(fields)
    model = build(args, overrides, 'gguf_gpt2' if arch == 'gpt2' else 'gguf', sources, dtype, path)
    return model, fits(tokenizer, model, path)


def read_gguf(path):
    """The package gguf, the metadata {key: value} and the tensors {name: (tensor, shape)} of a file."""
    gguf = package(path)

    class Reader(gguf.GGUFReader):  # which takes what lies behind the end of a file for an empty array
        def _get(self, offset, dtype, count=1, override_order=None):
            self.data = np.asarray(self.data)  # slices of a memmap itself would cost three times as much
            if offset + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError('it ends too early')
            return super()._get(offset, dtype, count, override_order)

    try:
        reader = Reader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {t.name: (t, tuple(int(n) for n in reversed(t.shape))) for t in reader.tensors}
    except OSError as error:
        raise UserError(f'{path}: {error.strerror or reason_of(error)}') from None
    except Exception as error:  # a damaged file can raise nearly anything
        raise UserError(f'{path}: not a whole GGUF file ({reason_of(error)})') from None
    return gguf, fields, tensors


# keys of a GGUF file, after its architecture's name: those read, those that change nothing, those of one value only
GGUF_READ = {'context_length', 'block_count', 'embedding_length', 'feed_forward_length', 'attention.head_count',
             'attention.head_count_kv', 'attention.key_length', 'attention.layer_norm_rms_epsilon',
             'attention.layer_norm_epsilon', 'rope.freq_base', 'rope.scaling.type', 'rope.scaling.factor',
             'rope.scale_linear', 'rope.scaling.original_context_length', 'rope.scaling.yarn_beta_slow',
             'rope.scaling.yarn_beta_fast', 'expert_count', 'expert_used_count', 'expert_feed_forward_length'}
GGUF_IDLE = {'vocab_size', 'tensor_data_layout', 'rope.scaling.finetuned'}
GGUF_ONLY = {'attention.causal': True, 'rope.scaling.attn_factor': 1.0, 'rope.scaling.yarn_attn_factor': 1.0,
             'expert_gating_func': 1, 'expert_weights_norm': True,  # softmax, and what is chosen adds up to 1
             'attention.sliding_window_pattern': 6, 'rope.freq_base_swa': 10000.0}  # of Gemma 3, whatever a file says


def gguf_args(fields):
    """The metadata of a GGUF file -> fields of GPTConfig; UserError for the first key that we cannot honour."""
    arch = fields.get('general.architecture')
    if arch not in ARCHITECTURES.values():
        known = ', '.join(map(repr, dict.fromkeys(ARCHITECTURES.values())))
        fields.refuse('general.architecture', f'is not one of {known}')
    if fields.get('general.type', 'model') != 'model':
        fields.refuse('general.type', "is not 'model'")
    if fields.get('split.count', 1) not in (0, 1):
        fields.refuse('split.count', 'is not one file: join them with llama-gguf-split --merge')
    config = Json({k.removeprefix(f'{arch}.'): v for k, v in fields.values.items() if k.startswith(f'{arch}.')},
                  fields.where, f'{arch}.')
    family = next(name for name, found in ARCHITECTURES.items() if found == arch)
    # a norm's weight, in a file of Gemma 3 too, is what it multiplies by
    args = FAMILIES[family].constants() | {'norm_offset': False}
    for field, key in (('block_size', 'context_length'), ('n_layer', 'block_count'), ('n_embd', 'embedding_length'),
                       ('mlp_dim', 'feed_forward_length'), ('n_head', 'attention.head_count')):
        args[field] = config.number(key, 0)
    args['head_dim'] = config.number('attention.key_length', max(1, args['n_embd'] // args['n_head']))
    args['n_kv_head'] = config.number('attention.head_count_kv', args['n_head'])
    # a float32 there: 1e-5 is meant by 9.999999747378752e-06
    epsilon = config.number(f'attention.layer_norm_{"" if arch == "gpt2" else "rms_"}epsilon', 1e-5)
    args['norm_eps'] = float(f'{epsilon:.7g}')
    if arch == 'gemma3':
        args |= gemma_args(config, args)
    only = GGUF_ONLY | dict.fromkeys(('attention.value_length', 'rope.dimension_count'), args['head_dim'])
    for key, value in config.values.items():
        read = GGUF_READ | ({'attention.sliding_window'} if arch == 'gemma3' else set())
        if value != only.get(key, value) or value and key not in read | GGUF_IDLE | only.keys():
            config.refuse(key)
    if arch == 'gpt2':
        return args
    if config.get('expert_count'):
        args['n_expert'] = config.number('expert_count', 0)
        args['n_expert_active'] = config.number('expert_used_count', 0)
        args['expert_dim'] = config.number('expert_feed_forward_length', args['mlp_dim'])
        args['router_renorm'] = renormalised(args, True)
    args['rope_theta'] = config.number('rope.freq_base', 10000.0)
    return args | gguf_scaling(config, args['block_size'])


def gemma_args(config, args):
    """The fields of GPTConfig that only Gemma 3's keys have a say in."""
    found = {'embed_scale': math.sqrt(args['n_embd'])}
    if args['n_layer'] == 62:  # the one of 27B
        found['attn_scale'] = (args['n_embd'] / args['n_head']) ** -0.5
    if config.get('attention.sliding_window'):
        found |= {'window': config.number('attention.sliding_window', 0), 'window_pattern': 'LLLLLG',
                  'rope_theta_local': 10000.0}
    return found


def gguf_scaling(config, block_size):
    """The fields of GPTConfig for the rope.scaling keys of a GGUF file, as llama.cpp reads them; {} for none."""
    key = next((k for k in ('rope.scaling.factor', 'rope.scale_linear') if config.get(k)), None)
    kind, factor = config.get('rope.scaling.type', 'linear'), config.number(key, 1.0) if key else 1.0
    if kind not in ('none', 'linear', 'yarn'):
        config.refuse('rope.scaling.type')
    if factor < 1:
        config.refuse(key, 'must be at least 1')
    if kind == 'none' or factor == 1:
        return {}
    original = config.number('rope.scaling.original_context_length', block_size)
    args = {'rope_scaling': kind, 'rope_factor': factor, 'rope_original': original}
    for field, end in ('rope_low', 'slow'), ('rope_high', 'fast'):
        if kind == 'yarn' and config.get(f'rope.scaling.yarn_beta_{end}'):
            args[field] = config.number(f'rope.scaling.yarn_beta_{end}', 1.0)
    return args


def llama3_scaling(stretch, args, original=8192):
    """What rotary frequencies are divided by, (head_dim / 2,) -> the fields of GPTConfig for rope_scaling='llama3' that
    say the same, {} where that is nothing, None where none do.

    The share of a frequency that stays, 0 to 1, is a line in its number of turns within the original context. Of that
    only the ratio to where the line begins and ends is to be seen, so it is taken to be Llama's.
    """
    f = frequencies(args['head_dim'], args['rope_theta'])
    if stretch.shape != f.shape or not (np.isfinite(stretch).all() and stretch.min() > 0.99999):
        return None
    factor = float(f'{stretch.max():.6g}')
    if factor == 1:
        return {}
    stay, turns = (1 / stretch.astype(float) - 1 / factor) / (1 - 1 / factor), original * f.double() / (2 * math.pi)
    between = (stay > 1e-3) & (stay < 1 - 1e-3)
    low, high = 1.0, 4.0  # of all Llamas; the line where two points show it
    if between.sum() > 1:
        slope, start = np.polyfit(turns[between], stay[between], 1)
        low, high = (float(f'{end:.6g}') for end in (-start / slope, (1 - start) / slope))
    fields = {'rope_scaling': 'llama3', 'rope_factor': factor, 'rope_original': original, 'rope_low': low,
              'rope_high': high}
    with contextlib.suppress(ValueError):  # impossible values
        found = rope_frequencies(GPTConfig(**args | fields))[0]
        return fields if torch.allclose(found * torch.tensor(stretch), f, rtol=1e-5, atol=0) else None


# ----------------------------------------------------------------------------------------------------------------------
# writing

def gguf_config(config, arch):
    """A GPTConfig that fits an architecture of llama.cpp -> the metadata that begin with the name of that."""
    values = {'context_length': config.block_size, 'block_count': config.n_layer, 'embedding_length': config.n_embd,
              'feed_forward_length': config.mlp_dim, 'attention.head_count': config.n_head,
              'vocab_size': config.vocab_size}
    if arch == 'gpt2':
        return values | {'attention.layer_norm_epsilon': config.norm_eps}
    values |= {'attention.head_count_kv': config.n_kv_head, 'attention.layer_norm_rms_epsilon': config.norm_eps,
               'attention.key_length': config.head_dim, 'attention.value_length': config.head_dim,
               'rope.dimension_count': config.head_dim, 'rope.freq_base': config.rope_theta}
    if config.n_expert:
        values |= {'expert_count': config.n_expert, 'expert_used_count': config.n_expert_active}
        values['feed_forward_length' if arch == 'llama' else 'expert_feed_forward_length'] = config.expert_dim
    if arch == 'gemma3' and config.window:
        values['attention.sliding_window'] = config.window
    if config.rope_scaling != 'none':
        values['rope.scaling.original_context_length'] = config.rope_original
    if config.rope_scaling in ('linear', 'yarn'):  # llama3 is a tensor
        values |= {'rope.scaling.type': config.rope_scaling, 'rope.scaling.factor': config.rope_factor}
    return values


def gguf_tensors(model, arch):
    """Yields (name, tensor) of a GPT in the order of rows that llama.cpp wants."""
    config = model.config
    heads = {'attn_q': config.n_head, 'attn_k': config.n_kv_head} if arch == 'llama' else {}
    for name, tensor in tensors_of(model, 'gguf_gpt2' if arch == 'gpt2' else 'gguf'):
        if n := heads.get(name.split('.')[-2]):
            tensor = tensor.unflatten(0, (n, 2, -1)).transpose(1, 2).flatten(0, 2)
        yield name, tensor
    if config.rope_scaling == 'llama3':
        yield 'rope_freqs.weight', frequencies(config.head_dim, config.rope_theta) / rope_frequencies(config)[0]


def type_of(name, shape, kind):
    """The type of a tensor in a file of a kind, as llama.cpp's converter chooses it."""
    if len(shape) == 1 or name in ('position_embd.weight', 'rope_freqs.weight') or 'ffn_gate_inp' in name:
        return 'F32'
    return 'F16' if kind == 'q8_0' and shape[-1] % 32 else kind.upper()  # its blocks are of 32 numbers


def to_gguf(model, path, tokenizer, kind='f16', about=None):
    """Writes a GPT and its tokenizer as a GGUF file, all or nothing, and a Modelfile beside it, if there is none.

    kind: of TYPES, for the matrices; what is small stays float32. about: more of the metadata, {'general.…': value}.
    Raises UserError for a field or a tokenizer that llama.cpp does not have, a path that exists, a disk that fails.
    """
    path, config = Path(path), model.config
    vacant_file(path)
    gguf, arch = package(path), ARCHITECTURES[hf_family(config, gguf=True)]
    fits(tokenizer, model, path)
    say_what_is_left_out(config)
    with runtime.user_errors(path):
        vocabulary = tokenizers.gguf_vocabulary(tokenizer, config.vocab_size)
    values = {'general.architecture': arch, 'general.type': 'model', 'general.file_type': TYPES[kind],
              'general.quantization_version': gguf.GGML_QUANT_VERSION} | (about or {})
    values |= {f'{arch}.{key}': value for key, value in gguf_config(config, arch).items()} | vocabulary

    class Writer(gguf.GGUFWriter):
        def _pack_val(self, val, vtype, *args, **more):  # which refuses to write that there are no merges
            empty = vtype == gguf.GGUFValueType.ARRAY and not len(val)
            found = super()._pack_val([''] if empty else val, vtype, *args, **more)
            return found[:-16] + bytes(8) if empty else found

    def write(file):
        writer = Writer(None, arch)
        for key, value in values.items():
            if key != 'general.architecture':
                add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
                add.get(type(value), lambda key, value: writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY))(
                    key, value)
        for name, tensor in gguf_tensors(model, arch):
            quant = gguf.GGMLQuantizationType[type_of(name, tensor.shape, kind)]
            shape = gguf.quant_shape_to_byte_shape(tensor.shape, quant)
            writer.add_tensor_info(name, shape, np.dtype(np.uint8), math.prod(shape), quant)
        writer.fout, writer.state = [file], gguf.gguf_writer.WriterState.EMPTY
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in gguf_tensors(model, arch):  # one at a time
            weights, quant = tensor.detach().float().cpu(), type_of(name, tensor.shape, kind)
            if not weights.isfinite().all():
                raise UserError(f'{path}: tensor {name} has values that are not finite: its training diverged')
            if quant == 'F16' and weights.abs().max() >= 65520:
                raise UserError(f'{path}: tensor {name} has values that f16 cannot hold: give --type=bf16')
            data = gguf.quantize(weights.contiguous().numpy(), gguf.GGMLQuantizationType[quant])
            writer.write_padding(file, file.tell())
            file.write(np.ascontiguousarray(data))  # whose errors name a full disk, unlike those of write_tensor_data
        writer.write_padding(file, file.tell())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        runtime.write_atomic(path, write)
        if not (recipe := path.with_name('Modelfile')).exists():
            text = modelfile(path.name, tokenizer)
            runtime.write_atomic(recipe, lambda file: file.write(text.encode()))
            print(f'{recipe}: for ollama; what a system says first goes there as SYSTEM "…"')
        else:
            print(f'{recipe} is there already and stays: its FROM may name another file than {path.name}')
    except OSError as error:
        raise UserError(f'{path}: not written ({error.strerror or reason_of(error)})') from None
    if tokenizer.encode('e\u0301') == tokenizer.encode('\xe9'):
        print(f'{path}: llama.cpp does not make text NFC first, as this tokenizer does: give it such text')


def vacant_file(path):
    """UserError where a file that is to be written exists."""
    if path.exists():
        raise UserError(f'{path}: already exists; give a new name')


def modelfile(name, tokenizer):
    """What `ollama create NAME -f Modelfile` reads."""
    ends = [tokenizer.decode_bytes([i]).decode(errors='replace') for i in tokenizer.turn_ids]
    stops = [f'PARAMETER stop {json.dumps(end, ensure_ascii=False)}' for end in ends]
    return '\n'.join([
        '# ollama create mine -f Modelfile && ollama run mine',
        '# The chat template is in the file, in Jinja. Of those that ollama knows it takes the nearest if one is near,',
        '# as to ChatML; else a version with llama-server renders that of the file, an older one none: then give it',
        "# a TEMPLATE here, in Go's language.",
        f'FROM ./{name}', *stops, ''])
