"""
A model judged by others' yardsticks: benchmarks with intervals, two models compared, and whether the answers leaked.

    python evaluate.py --init_from=smollm2 --tasks=arc_easy,hellaswag --limit=200
    python evaluate.py --init_from=out/tiny --text=data/shakespeare/val.bin --stride=64      bits per byte of a text
    python evaluate.py --init_from=out/sft --against=out/tiny                    on the same questions, McNemar's test
    python evaluate.py --init_from=out/sft --against=out/tiny --tasks=nq_open --judge=out/reward     of free answers
    python evaluate.py --tasks=all --check=data/shakespeare/train.bin            do the questions stand in it?

Prompts are lm-eval's, to the letter; `ask` and TASKS have them. A choice is scored by its log-likelihood after the
question: `acc` takes the likeliest, `acc_norm` the likeliest per character, `acc_token` per token, and `acc_uncond` the
one that gains most over "Answer:" alone. What a question's choices share is read once, and what all questions share,
such as the examples of --num_fewshot, once for all of them (`log_likelihoods`). Each answer is appended to
out/evaluate/MODEL/TASK.jsonl, and whoever starts again goes on there. HumanEval is judged by the bits per byte of its
solution: no program that a model wrote is run here.

Papers: few-shot prompts (GPT-3, arXiv:2005.14165, whose 13-grams `--check` counts, too), lm-eval (arXiv:2405.14782),
OLMES (arXiv:2406.08446), LAMBADA (arXiv:1606.06031), MMLU (arXiv:2009.03300), CORE (DataComp-LM, arXiv:2406.11794).
"""
import functools
import hashlib
import json
import math
import os
import random
import re
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import runtime

import torch

from dataset import TokenData
from generate import Batch, KVCache, Row, pack, padded
from grade import difference, interval, normalise, token_f1
from load import fingerprint, load_model
from model import GPTConfig
from progress import Progress
from rollout import load_scorer
from tokenizer import UNK, UserError

# what is measured
init_from = 'out/tiny'  # a run's directory or checkpoint, a Hugging Face directory, a .gguf file, smollm2, gpt2 …
tasks = 'core'  # names with commas between them; core: those of CORE that are here; mmlu: its 57 subjects; all
limit = 200  # questions of each task, drawn by seed, so that more of them contain fewer; 0 = all
num_fewshot = 0  # examples with their answers before each question, the same for all
max_new_tokens = 32  # of an answer in its own words
text = ''  # instead of tasks: bits per byte and perplexity of a .txt, .jsonl or .bin file
stride = 0  # of text: tokens scored at a time, each after at least block_size - stride others; 0 = half of block_size
against = ''  # another model, or a folder of its results: the same questions, and a paired test
judge = ''  # with against: a run of reward.py scores both models' answers to questions of open tasks
check = ''  # train on these? files with commas between them: questions that share 13 words in a row with them
batch_tokens = 8192  # tokens that are in memory at a time
# where it goes
out_dir = ''  # where results go; empty: out/evaluate/MODEL
data_dir = 'data/benchmarks'  # where data/benchmarks/prepare.py put the questions
seed = 1337  # which questions are drawn
# machine
device = 'auto'  # 'cpu', 'cuda', 'mps'; auto = the best there is
dtype = 'float32'  # 'bfloat16', 'float16' or 'auto' is faster on some devices and less exact
quant = ''  # on a CPU: weights in 16 bits ('fp16') or 8 ('int8')


# ----------------------------------------------------------------------------------------------------------------------
# the tasks and their prompts

@dataclass(frozen=True)
class Task:
    """How a benchmark is put to a model.

    kind: 'choice', the likeliest of some endings; 'letter', of A, B, C …; 'blank', of some beginnings; 'word', whether
    the ending is the likeliest text; 'open', an answer in its own words; 'bits', bits per byte of the ending.
    metric: the one to quote. description comes first, then examples, with `between` after each.
    """
    prompt: str = 'Question: {question}\nAnswer:'
    kind: str = 'choice'
    metric: str = 'acc'
    split: str = 'validation'
    description: str = ''
    between: str = '\n\n'
    before_answer: str = ' '
    until: tuple = ('\n', '.', ',')  # ends an answer in its own words
    uncond: bool = False  # whether acc_uncond is asked for
    file: str = ''


LETTERS = 'Question: {question}{letters}\nAnswer:'
TASKS = {
    'arc_easy': Task(metric='acc_norm', split='test'),
    'arc_challenge': Task(metric='acc_norm', split='test', uncond=True),
    'hellaswag': Task('{question}', metric='acc_norm'),
    'piqa': Task(metric='acc_norm'),
    'winogrande': Task('', 'blank'),
    'boolq': Task('{context}\nQuestion: {question}?\nAnswer:'),
    'copa': Task('{question}'),
    'openbookqa': Task('{question}', metric='acc_norm', split='test', uncond=True),
    'commonsense_qa': Task(LETTERS, 'letter'),
    'social_iqa': Task('Q: {context} {question}\nA:'),
    'sciq': Task('{context}\nQuestion: {question}\nAnswer:', metric='acc_norm'),
    'lambada': Task('{question}', 'word', split='test'),
    'jeopardy': Task('{question}', 'word', split='train'),
    'coqa': Task('{question}', 'word'),
    'triviaqa': Task('Question: {question}?\nAnswer:', 'open', 'exact'),
    'nq_open': Task('Q: {question}?\nA:', 'open', 'exact', description='Answer these questions:\n\n', between='\n'),
    'squad': Task('{question}', 'open', 'f1', until=('\n',)),
    'drop': Task('{context} {question}', 'open', 'f1', before_answer='', until=('.',)),
    'humaneval': Task('{question}', 'bits', 'bpb', split='test', before_answer='')}
SUBJECTS = (
    'abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology college_chemistry '
    'college_computer_science college_mathematics college_medicine college_physics computer_security '
    'conceptual_physics econometrics electrical_engineering elementary_mathematics formal_logic global_facts '
    'high_school_biology high_school_chemistry high_school_computer_science high_school_european_history '
    'high_school_geography high_school_government_and_politics high_school_macroeconomics high_school_mathematics '
    'high_school_microeconomics high_school_physics high_school_psychology high_school_statistics '
    'high_school_us_history high_school_world_history human_aging human_sexuality international_law jurisprudence '
    'logical_fallacies machine_learning management marketing medical_genetics miscellaneous moral_disputes '
    'moral_scenarios nutrition philosophy prehistory professional_accounting professional_law professional_medicine '
    'professional_psychology public_relations security_studies sociology us_foreign_policy virology '
    'world_religions').split()
TASKS |= {f'mmlu_{subject}': Task('{question}{letters}\nAnswer:', 'letter', split='test', file='mmlu', description=(
    f'The following are multiple choice questions (with answers) about {subject.replace("_", " ")}.\n\n'))
    for subject in SUBJECTS}
CORE = ('hellaswag', 'jeopardy', 'arc_easy', 'arc_challenge', 'copa', 'commonsense_qa', 'piqa', 'openbookqa', 'lambada',
        'winogrande', 'coqa', 'boolq')  # of its 22
SUITES = {'core': CORE, 'mmlu': [name for name in TASKS if name.startswith('mmlu_')], 'all': [*TASKS]}


def find_tasks(names):
    """'arc_easy,mmlu' -> names of tasks, each once; UserError with the nearest name for an unknown one."""
    found = []
    for name in filter(None, (name.strip() for name in names.split(','))):
        if name not in TASKS and name not in SUITES:
            raise UserError(f'tasks: no task {name!r}: {runtime.suggest(name, [*TASKS, *SUITES])}')
        found += SUITES.get(name, [name])
    if not found:
        raise UserError(f'tasks={names!r} names none: give one of {", ".join([*SUITES, *TASKS][:12])} …')
    return [*dict.fromkeys(found)]


@functools.cache
def read_lines(path):
    """The lines of a file of questions, parsed, each with its number in 'id'; UserError names one that is damaged."""
    rows = []
    try:
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            rows.append(json.loads(line) | {'id': number})
    except OSError as error:
        raise UserError(f'{path}: {error.strerror}: run `python data/benchmarks/prepare.py` first') from None
    except (ValueError, TypeError) as error:
        raise UserError(DAMAGED.format(f'{path}, line {number}', error)) from None
    return rows


DAMAGED = '{} is no question ({}): run `python data/benchmarks/prepare.py` again'


def read_rows(path, task, subject=''):
    """The rows of a task's file, of one subject where there are several; UserError names one that lacks a part."""
    rows = [row for row in read_lines(path) if not subject or row.get('subject') == subject]
    key = 'answers' if task.kind in ('word', 'open', 'bits') else 'choices'
    for row in rows:
        texts = [row.get('question'), row.get('context', ''), *(row[key] if isinstance(row.get(key), list) else [None])]
        whole = (all(isinstance(part, str) for part in texts) and all(texts[2:]) and len(texts) > 2
                 and (key == 'answers' or type(row.get('gold')) is int and 0 <= row['gold'] < len(row[key]))
                 and ('{context}' not in task.prompt or 'context' in row)
                 and (task.kind != 'blank' or '_' in row['question']))
        if not whole:
            raise UserError(DAMAGED.format(f'{path}, line {row["id"]}', 'a part is missing or of another type'))
    if not rows:
        raise UserError(f'{path} has no questions{f" on {subject}" * bool(subject)}: run `python data/benchmarks/'
                        'prepare.py` again')
    return rows


def ask(task, row):
    """A question as lm-eval puts it -> [(context, ending)], one for each choice, or one with the answer."""
    if task.kind == 'blank':  # the ending is what follows the blank
        before, _, after = row['question'].partition('_')
        return [(before + choice, task.before_answer + after.strip()) for choice in row['choices']]
    endings, letters = row.get('choices') or row['answers'][:1], ''
    if task.kind == 'letter':
        letters = ''.join(f'\n{letter}. {choice}' for letter, choice in zip('ABCDEFGHIJ', endings, strict=False))
        endings = 'ABCDEFGHIJ'[:len(endings)]
    context = task.prompt.format(question=row['question'], context=row.get('context', ''), letters=letters)
    return [(context, task.before_answer + ending) for ending in endings]


def examples(task, rows):
    """The text before every question: the description, and rows with their answers."""
    return [task.description, *(''.join(ask(task, row)[row.get('gold', 0)]) + task.between for row in rows)]


@functools.cache
def draw(name):
    """The rows of a task to ask, by seed, and those that serve as examples: of another split where there is one, else
    of the end of that order, which is not asked then."""
    task = TASKS[name]
    subject = name.removeprefix('mmlu_') if task.file else ''
    path = Path(data_dir) / f'{task.file or name}.jsonl'
    rows, shots = read_rows(path, task, subject), path.with_name(f'{path.stem}_shots.jsonl')
    random.Random(seed).shuffle(rows)
    if num_fewshot and shots.exists():
        spare = read_rows(shots, task, subject)[:num_fewshot]
    else:
        spare, rows = rows[::-1][:num_fewshot], rows[:len(rows) - num_fewshot]
    if len(spare) < num_fewshot or not rows:
        raise UserError(f'num_fewshot={num_fewshot}: {name} has {len(spare)} rows to spare for examples: lower it')
    return rows[:limit or None], spare


def with_start(tokenizer, text):
    """The ids of a text behind one that only serves as context: bos where the tokenizer has one, else <|endoftext|>."""
    return [tokenizer.eot if tokenizer.bos is None else tokenizer.bos, *tokenizer.encode(text)]


def encode_pair(tokenizer, context, ending):
    """A context and what follows -> (ids, how many of them are of the ending), cut as lm-eval does: together, so that
    the first token of the ending may hold the blank before it. UserError where the tokenizer cannot spell it."""
    cut = len(context.rstrip()) if ending else len(context)
    context, ending = context[:cut], context[cut:] + ending
    known, whole = with_start(tokenizer, context), with_start(tokenizer, context + ending)
    if context and tokenizer.bos is None:
        known, whole = known[1:], whole[1:]
    ids = known + whole[len(known):]
    if ending and (len(ids) == len(known) or tokenizer.special.get(UNK, -1) in ids[len(known):]):
        raise UserError(f'tokenizer {tokenizer.name} cannot spell the answer {ending!r:.60}: leave this task out')
    return ids, len(ids) - len(known)


# ----------------------------------------------------------------------------------------------------------------------
# log-likelihoods and answers, many at a time

def common_prefix(texts):
    """How many ids all of some lists begin with."""
    first, last = min(texts), max(texts)  # those between them begin alike
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def batches(lengths, known, size, block_size):
    """Numbers of questions, the longest first, in lists of at most size tokens in memory. lengths: how many texts each
    has, how long they are behind the known ids, and how much of that they share. What comes behind it is padded to the
    same length in all, which must not lead out of the context."""
    batch, total, longest, shared, rest = [], 0, 0, 0, 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i][1], lengths[i][2])):
        count, length, begin = lengths[i]
        shared, rest, longest = max(shared, begin), max(rest, length - begin), max(longest, length)
        if batch and (total + count * (known + longest) > size or known + shared + rest > block_size + 1):
            yield batch
            batch, total, longest, shared, rest = [], 0, length, begin, length - begin
        batch.append(i)
        total += count * (known + longest)
    if batch:
        yield batch


def read_prefix(model, ids):
    """A cache of one row that holds ids, perhaps none."""
    cache = KVCache(model.config, 1, len(ids), model.tok_emb.weight.device)
    if ids:
        model.hidden(torch.tensor([ids], device=cache.device), cache=cache)
    return cache


def copies(prefix, count, capacity):
    """A cache of count rows, each with room for so many tokens, all of which begin with what prefix, a cache, holds."""
    cache = prefix.part(0, prefix.lengths[0])
    cache.reserve(capacity)
    cache.select([0] * count)
    return cache


@torch.inference_mode()
def log_likelihoods(model, questions, batch_tokens=8192):
    """Yields for some questions at a time {number: [(log-likelihood, whether it is the likeliest text), …]}.

    questions: lists of texts (ids, n): the last n ids of a text are judged after those before them. What all questions
    share is read once, then what the texts of each share, then the rest of each text; only judged tokens get logits.
    A text that is longer than block_size loses its beginning.
    """
    device, block = model.tok_emb.weight.device, model.config.block_size
    if not questions:
        return
    questions = [[(ids[-block - 1:], min(n, block)) for ids, n in texts] for texts in questions]
    # the last token before an ending is read with it, as its first logits come from there
    known = min(common_prefix([ids for texts in questions for ids, _ in texts]),
                min(len(ids) - n - 1 for texts in questions for ids, n in texts))
    prefix = read_prefix(model, questions[0][0][0][:known])
    shared = [max(known, min(common_prefix([ids for ids, _ in texts]), min(len(ids) - n - 1 for ids, n in texts)))
              for texts in questions]
    lengths = [(len(texts), max(len(ids) for ids, _ in texts) - known, begin - known)
               for texts, begin in zip(questions, shared, strict=True)]
    for batch in batches(lengths, known, batch_tokens, block):
        cache = copies(prefix, len(batch), known + lengths[batch[0]][1])
        middles = [questions[i][0][0][known:shared[i]] for i in batch]
        if any(middles):
            model.hidden(padded(middles).to(device), cache=cache, counts=[*map(len, middles)])
        rows = [(i, k) for i in batch for k in range(len(questions[i]))]
        if len(rows) > len(batch):
            cache.select([place for place, i in enumerate(batch) for _ in questions[i]])
        texts = [questions[i][k] for i, k in rows]
        tails = [ids[shared[i]:-1] for (ids, _), (i, _) in zip(texts, rows, strict=True)]
        hidden = model.hidden(padded(tails).to(device), cache=cache, counts=[*map(len, tails)])
        judged = torch.cat([row[len(tail) - n:len(tail)]
                            for row, tail, (_, n) in zip(hidden, tails, texts, strict=True)])
        targets = torch.tensor([token for ids, n in texts for token in ids[-n:]], device=device)
        logprobs, likeliest = [], []
        for states, wanted in zip(judged.split(512), targets.split(512), strict=True):
            logits = model.logits(states)
            logprobs.append(logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0])
            likeliest.append(logits.argmax(-1) == wanted)
        counts = [n for _, n in texts]
        found = {i: [] for i in batch}
        for (i, _), of, best in zip(rows, torch.cat(logprobs).double().cpu().split(counts),
                                    torch.cat(likeliest).cpu().split(counts), strict=True):
            found[i].append((of.sum().item(), bool(best.all())))
        yield found


@torch.inference_mode()
def answers(model, tokenizer, prompts, until, max_new_tokens, batch_tokens=8192):
    """Yields for some prompts (lists of ids) at a time {number: what greedy decoding gives, up to one of until}.

    A prompt that leaves no room for the answer loses its beginning.
    """
    if not prompts:
        return
    prompts = [ids[-max(1, model.config.block_size - max_new_tokens):] for ids in prompts]
    known = min(common_prefix(prompts), min(map(len, prompts)) - 1)
    prefix = read_prefix(model, prompts[0][:known])
    ends = {i for i in range(tokenizer.n_vocab) if any(mark in tokenizer.decode([i], start=False) for mark in until)}
    lengths = [(1, len(ids) - known + max_new_tokens, 0) for ids in prompts]
    for batch in batches(lengths, known, batch_tokens, model.config.block_size):
        rows = [Row(prompts[i], max_new_tokens, [0.0], number=i) for i in batch]
        side_by_side = Batch(model)
        cache = copies(prefix, len(batch), known + lengths[batch[0]][1])
        side_by_side.admit(rows, cache=cache)
        while not all(row.done for row in rows):
            ids = side_by_side.advance()[:, :tokenizer.n_vocab].argmax(-1).tolist()
            side_by_side.append(ids, [0.0] * len(ids), ends.union(tokenizer.stop_ids))
            side_by_side.retire(at_once=False)
        texts = {row.number: tokenizer.decode([i for i in row.answer if i not in tokenizer.stop_ids], start=False)
                 for row in rows}
        yield {i: min((text.partition(mark)[0] for mark in until), key=len, default=text) for i, text in texts.items()}


def windows(ids, block_size, stride):
    """A text whose first id only serves as context -> texts (ids, n) that judge each other token once: the first window
    block_size of them, each later one the next `stride` after as many as fit before them."""
    found, done = [], 1
    while done < len(ids):
        n = min(block_size if done == 1 else stride, len(ids) - done)
        done += n
        found.append((ids[max(0, done - block_size - 1):done], n))
    return found


# ----------------------------------------------------------------------------------------------------------------------
# a model on a task

class Judged:
    """A model, its tokenizer, a name, and a fingerprint of all that its numbers depend on."""

    def __init__(self, source, device='auto', dtype='float32', quant='', **overrides):
        self.source = str(source)
        model, self.tokenizer = load_model(source, **overrides)
        config = model.config
        if config.n_encoder_layer or not config.causal:
            raise UserError(f'{source} has an encoder, or is one: evaluate.py judges models that continue a text')
        where = runtime.pick_device(device)
        weights = model.num_params()
        kind = runtime.pick_dtype(dtype, where, weights)[1]
        self.fingerprint = fingerprint(model.state_dict(), f'{asdict(config)} {kind} {quant}')[:12]
        with runtime.user_errors(source):
            self.model = pack(model.to(where, kind).eval(), runtime.pick_quant(quant, dtype, where, weights))
        name = re.sub(r'[^\w.-]+', '_', self.source.strip('./')) or 'model'
        self.folder = Path('out/evaluate') / name


def fit(judged, name, rows, shots):
    """Prompts for rows -> [(row, texts (ids, n))], how many lost examples, and how many their beginning, because the
    model's context is too short. The examples that are dropped are the last ones."""
    task, tokenizer, room = TASKS[name], judged.tokenizer, judged.model.config.block_size + 1
    room -= max_new_tokens if task.kind == 'open' else 0
    if room < 2:
        raise UserError(f'max_new_tokens={max_new_tokens} leaves no room in block_size={judged.model.config.block_size}'
                        f' of {judged.source}: lower it')
    asked, lost, cut = [], 0, 0
    parts = examples(task, shots)
    for row in rows:
        for kept in range(len(shots), -1, -1):
            before = ''.join(parts[:kept + 1])
            try:
                texts = [encode_pair(tokenizer, before + context, ending) for context, ending in ask(task, row)]
            except UserError as error:
                raise UserError(f'{name}, line {row["id"]}: {error}') from None
            if max(len(ids) for ids, _ in texts) <= room:
                break
        if len({(*ids,) for ids, _ in texts}) < len(texts) == len(set(ask(task, row))):
            raise UserError(f'{name}, line {row["id"]}: tokenizer {tokenizer.name} spells two choices alike: leave '
                            'this task out')
        lost += kept < len(shots)
        cut += max(len(ids) for ids, _ in texts) > room
        asked.append((row, kept, texts))
    return asked, lost, cut


def marks_of(task, row, results, uncond=None):
    """What a question's results, (log-likelihood, likeliest) of each text or an answer, are worth: {metric: number}."""
    if task.kind == 'open':
        exact = max(float(normalise(results) == normalise(gold)) for gold in row['answers'])
        return {'exact': exact, 'f1': max(token_f1(results, gold) for gold in row['answers'])}
    if task.kind == 'word':
        return {'acc': float(results[0][1]), 'nats': -results[0][0]}
    if task.kind == 'bits':
        return {'bpb': -results[0][0] / math.log(2) / len(row['answers'][0].encode())}
    logprobs = [logprob for logprob, _, _ in results]
    scores = {'acc': logprobs}
    if task.kind == 'choice':
        scores |= {'acc_norm': [x / len(choice) for x, choice in zip(logprobs, row['choices'], strict=True)],
                   'acc_token': [logprob / n for logprob, _, n in results]}
    if uncond:
        scores['acc_uncond'] = [x - y for x, (y, _) in zip(logprobs, uncond, strict=True)]
    return {name: float(max(range(len(of)), key=of.__getitem__) == row['gold']) for name, of in scores.items()}


def read_results(path, prompt, model=None):
    """{line of a question: its result} of a file, of this prompt and this model, else of the last model in it. A line
    that a kill cut off is none."""
    found = {}
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            result = json.loads(line)
            if result['prompt'] == prompt and result['model'] == (model or result['model']):
                found.setdefault(result['model'], {})[result['id']] = result
        except (ValueError, KeyError, TypeError):
            continue
    return found.popitem()[1] if found else {}


def prompt_of(name, shots):
    """A fingerprint of all that is asked, whatever the model: the file of questions, the examples, and how."""
    task = TASKS[name]
    data = (Path(data_dir) / f'{task.file or name}.jsonl').read_bytes()
    how = [asdict(task), examples(task, shots), max_new_tokens * (task.kind == 'open')]
    return hashlib.sha256(data + json.dumps(how).encode()).hexdigest()[:12]


def results_of(judged, name, asked):
    """Yields for some (row, examples, texts) at a time {number: result}."""
    task, model, tokenizer = TASKS[name], judged.model, judged.tokenizer
    if task.kind == 'open':
        prompts = [texts[0][0][:-texts[0][1]] for _, _, texts in asked]
        for found in answers(model, tokenizer, prompts, task.until, max_new_tokens, batch_tokens):
            yield {i: {'answer': answer} | marks_of(task, asked[i][0], answer) for i, answer in found.items()}
        return
    for found in log_likelihoods(model, [texts for _, _, texts in asked], batch_tokens):
        uncond = {}
        if task.uncond:
            alone = [[encode_pair(tokenizer, 'Answer:', ending) for _, ending in ask(task, asked[i][0])] for i in found]
            for part in log_likelihoods(model, alone, batch_tokens):
                uncond |= {[*found][k]: pairs for k, pairs in part.items()}
        results = {}
        for i, pairs in found.items():
            row, kept, texts = asked[i]
            scored = [(*pair, n) for pair, (_, n) in zip(pairs, texts, strict=True)]
            results[i] = {'logprobs': [round(logprob, 5) for logprob, _ in pairs], 'tokens': [n for _, n in texts],
                          'num_fewshot': kept} | marks_of(task, row, scored, uncond.get(i))
        yield results


def run_task(judged, name, folder):
    """Asks what folder has no answers to yet, writing each batch as it comes -> ({line: result} in the order drawn, the
    fingerprint of the prompt, (questions that lost examples, questions whose beginning was cut))."""
    rows, shots = draw(name)
    prompt, path = prompt_of(name, shots), folder / f'{name}.jsonl'
    asked, lost, cut = fit(judged, name, rows, shots)
    done = read_results(path, prompt, judged.fingerprint)
    todo = [question for question in asked if question[0]['id'] not in done]
    show, began = Progress(f'{judged.source} {name}', 'questions', len(todo), sys.stderr), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    with open(path, 'ab+') as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            file.write(b'\n' * (file.read(1) != b'\n'))  # the last line was cut off: it ends here
        for kept in sorted({kept for _, kept, _ in todo}, reverse=True):  # those of as many examples share them
            some = [question for question in todo if question[1] == kept]
            for found in results_of(judged, name, some):
                for i, result in found.items():
                    keys = {'id': some[i][0]['id'], 'model': judged.fingerprint, 'prompt': prompt}
                    done[keys['id']] = keys | result
                    file.write(json.dumps(done[keys['id']], ensure_ascii=False).encode() + b'\n')
                file.flush()
                os.fsync(file.fileno())
                show(show.done + len(found))
    show.end(f'{len(todo)} questions in {time.monotonic() - began:.1f} s, {len(rows) - len(todo)} known before')
    return {row['id']: done[row['id']] for row in rows}, prompt, (lost, cut)


# ----------------------------------------------------------------------------------------------------------------------
# numbers and their intervals

def summary_of(name, results, rows):
    """{metric: (mean, low, high)} at 95 % of a task's results, its chance level and whether it is met: a dict."""
    task, results = TASKS[name], [*results.values()]
    means = {}
    for metric in ('acc', 'acc_norm', 'acc_token', 'acc_uncond', 'exact', 'f1', 'bpb', 'nats'):
        values = [result[metric] for result in results if metric in result]
        if values:
            means[metric] = (sum(values) / len(values), *interval(values))
    if 'nats' in means:
        means['perplexity'] = tuple(math.exp(min(x, 700)) for x in means.pop('nats'))
    chance = 0.0
    if task.kind in ('choice', 'letter', 'blank'):
        chance = sum(1 / len(row['choices']) for row in rows) / len(rows)
    low, high = means[task.metric][1:]
    return {'task': name, 'split': task.split, 'n': len(results), 'metric': task.metric, 'metrics': means,
            'chance': chance, 'at_chance': chance > 0 and low <= chance <= high}


def core_of(summaries):
    """DCLM's CORE over those of its tasks that are among the summaries: the mean of (accuracy - chance) / (1 - chance),
    a choice being the likeliest per token -> (mean, low, high, number of tasks); None without any."""
    values, halves = [], []
    for of in summaries:
        if of['task'] in CORE:
            mean, low, high = of['metrics'].get('acc_token', of['metrics']['acc'])
            values.append((mean - of['chance']) / (1 - of['chance']))
            halves.append((high - low) / 2 / (1 - of['chance']))
    if not values:
        return None
    mean, half = sum(values) / len(values), math.sqrt(sum(h * h for h in halves)) / len(values)
    return mean, mean - half, mean + half, len(values)


def as_text(metric, mean, low, high):
    """A metric with its interval, in words."""
    if metric in ('bpb', 'perplexity'):
        return f'{metric} {mean:.4g} ({low:.4g} to {high:.4g})'
    return f'{metric} {mean:.1%} ({low:.1%} to {high:.1%})'


def table(summaries):
    """Lines of a table: each task's metric to quote, chance, then its other metrics."""
    for of in summaries:
        others = ', '.join(as_text(name, *value) for name, value in of['metrics'].items() if name != of['metric'])
        chance = f'chance {of["chance"]:.1%}{": at chance" * of["at_chance"]}' if of['chance'] else ''
        quoted = as_text(of['metric'], *of['metrics'][of['metric']])
        yield f'{of["task"]:<16} {of["split"]:<10} {of["n"]:>5}  {quoted:<34} {chance:<24} {others}'.rstrip()
    subjects = [of for of in summaries if of['task'].startswith('mmlu_')]
    if len(subjects) > 1:
        hits = [round(of['metrics']['acc'][0] * of['n']) for of in subjects]
        n = sum(of['n'] for of in subjects)
        low, high = interval([1] * sum(hits) + [0] * (n - sum(hits)))
        yield (f'{"mmlu":<16} {"test":<10} {n:>5}  {as_text("acc", sum(hits) / n, low, high):<34} chance 25.0%'
               f'{": at chance" * (low <= 0.25 <= high)}   all {len(subjects)} subjects together')
    if core := core_of(summaries):
        yield (f'centred mean of {core[3]} of the 22 tasks of CORE: {core[0]:.3f} ({core[1]:.3f} to {core[2]:.3f}), '
               f'with these prompts and num_fewshot={num_fewshot}')


def paired(metric, ours, theirs):
    """What two models' results {line: result} differ by on the questions that both have, in words, with McNemar's exact
    test where each is right or wrong, else the mean difference's interval."""
    both = [(ours[i][metric], theirs[i][metric]) for i in ours if i in theirs]
    if not both:
        return 'no question in common'
    return f'{metric} {difference([a - b for a, b in both], "questions")}'


def judge_answers(names, ours, theirs):
    """Both models' answers to the questions of open tasks, scored by a reward model in both orders -> a line in words.

    A reward model reads one answer at a time, so the order may change nothing but rounding; where it does, or where the
    scores are equal, neither wins.
    """
    scorer, pairs = load_scorer(judge, runtime.Run('.', device, dtype, seed)), []
    for name in names:
        asked = {row['id']: ask(TASKS[name], row)[0][0] for row in draw(name)[0]}
        pairs += [([{'role': 'user', 'content': asked[i]}], ours[name][i]['answer'], theirs[name][i]['answer'])
                  for i in asked if i in theirs[name]]
    if not pairs:
        raise UserError(f'judge={judge}: no answers of both models: give tasks with answers in their own words')
    forth = scorer([(asked, said) for asked, *both in pairs for said in both]).reshape(-1, 2)
    back = scorer([(asked, said) for asked, *both in pairs for said in both[::-1]]).reshape(-1, 2)[:, ::-1]
    wins = [1.0 if a > b and c > d else 0.0 if a < b and c < d else 0.5
            for (a, b), (c, d) in zip(forth.tolist(), back.tolist(), strict=True)]
    low, high = interval(wins)
    return (f'{judge}: the first wins {sum(wins) / len(wins):.1%} ({low:.1%} to {high:.1%}) of {len(wins)} pairs, '
            f'{wins.count(0.5)} of them even or decided by their order, which count half')


# ----------------------------------------------------------------------------------------------------------------------
# texts: bits per byte, and questions that stand in them

def strings_in(value):
    """All strings in a JSON value, in order."""
    if isinstance(value, str):
        return [value]
    return [text for part in (value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())
            for text in strings_in(part)]


def read_texts(path):
    """Yields the documents of a file: a text, rows of JSON, or tokens with their tokenizer beside them."""
    path = Path(path)
    if path.suffix == '.bin':
        if not path.is_file():
            raise UserError(f'{path}: no such file')
        split = next((s for s in ('val', 'test') if s in re.split('[_.]', path.name)), 'train')
        data = TokenData(path.parent, split, 1)
        tokens, ids = data.shards[data.files.index(path)].tolist(), []
        for token in [*tokens, data.tokenizer.eot]:
            if token != data.tokenizer.eot:
                ids.append(token)
            elif ids:
                yield data.tokenizer.decode(ids)
                ids = []
        return
    try:
        content = path.read_text(encoding='utf-8')
        if path.suffix == '.jsonl':
            yield from ('\n'.join(strings_in(json.loads(line))) for line in content.splitlines() if line.strip())
        elif content:
            yield content
    except OSError as error:
        raise UserError(f'{path}: {error.strerror}') from None
    except ValueError as error:
        raise UserError(f'{path}: not UTF-8 text, or a line of it not JSON ({" ".join(str(error).split())})') from None


def judge_text(judged):
    """Bits per byte and perplexity of a text, window by window: a dict."""
    block = judged.model.config.block_size
    step = stride or max(1, block // 2)
    if not 1 <= step <= block:
        raise UserError(f'stride={stride} must be from 1 to block_size={block}')
    texts, size = [], 0
    for document in read_texts(text):
        texts += windows(with_start(judged.tokenizer, document), block, step)
        size += len(document.encode())
    if not texts:
        raise UserError(f'{text} is empty: give some text')
    show, nats = Progress(f'{judged.source} {text}', 'windows', len(texts), sys.stderr), {}
    for found in log_likelihoods(judged.model, [[window] for window in texts], batch_tokens):
        nats |= {i: -pairs[0][0] for i, pairs in found.items()}
        show(show.done + len(found))
    tokens = sum(n for _, n in texts)
    mean = sum(nats.values()) / tokens
    spread = interval([nats[i] / n for i, (_, n) in enumerate(texts)])
    unequal = sum(nats[i] / n for i, (_, n) in enumerate(texts)) / len(texts)
    means = (mean, mean + spread[0] - unequal, mean + spread[1] - unequal)
    show.end(f'{tokens:,} tokens, {size:,} bytes; stride {step} of {block}: after the first {block} of a document, '
             f'each token is scored after at least {block - step} others')
    return {'text': text, 'tokens': tokens, 'bytes': size, 'stride': step, 'block_size': block,
            'bpb': [nat * tokens / size / math.log(2) for nat in means],
            'perplexity': [math.exp(min(nat, 700)) for nat in means]}


def grams(text, n):
    """All runs of n words in a text, in lower case, each as a number."""
    words = re.findall(r'\w+', text.lower())
    return {hash(tuple(words[i:i + n])) for i in range(len(words) - n + 1)}


def contamination(names, files):
    """Lines that say how many of each task's questions share 13 words in a row with files (GPT-3, arXiv:2005.14165,
    appendix C), or all their words where they have 8 to 12. A question counts with its answer."""
    known, hit, short = {}, {name: set() for name in names}, Counter()
    asked = {name: draw(name)[0] for name in names}
    for name in names:
        for row in asked[name]:
            right = row['choices'][row['gold']] if 'gold' in row else row['answers'][0]
            content = f'{row.get("context", "")} {row["question"]} {right}'
            n = min(13, len(re.findall(r'\w+', content.lower())))
            short[name] += n < 8
            for gram in grams(content, n) if n >= 8 else ():
                known.setdefault(n, {}).setdefault(gram, []).append((name, row['id']))
    for path in files:
        for document in read_texts(path):
            for n, where in known.items():
                for gram in where.keys() & grams(document, n):
                    for name, i in where[gram]:
                        hit[name].add(i)
    for name in names:
        n = len(asked[name]) - short[name]
        low, high = interval([1] * len(hit[name]) + [0] * (n - len(hit[name]))) if n else (0, 1)
        yield (f'{name:<16} {len(hit[name])} of {n} questions share 13 words in a row with {", ".join(files)} '
               f'({low:.1%} to {high:.1%})' + (f', lines {sorted(hit[name])[:5]} of it among them' if hit[name] else '')
               + (f'; {short[name]} have fewer than 8 words and were left out' if short[name] else ''))


# ----------------------------------------------------------------------------------------------------------------------

def run_tasks(judged, names, folder):
    """({task: results}, {task: prompt}, summaries) of a model; tells of what its context has no room for."""
    results, prompts, summaries = {}, {}, []
    for name in names:
        results[name], prompts[name], (lost, cut) = run_task(judged, name, folder)
        if lost or cut:
            block = judged.model.config.block_size
            print(f'{name}: block_size={block} of {judged.source} is too short: {lost} of {len(results[name])} '
                  f'questions lost examples, {cut} their beginning', file=sys.stderr)
        rows = [row for row in draw(name)[0] if row['id'] in results[name]]
        summaries.append(summary_of(name, results[name], rows) | {'lost_examples': lost, 'cut': cut})
    return results, prompts, summaries


def compare(names, ours, prompts, overrides):
    """Results of the model, or the folder, that against names -> {task: results}; prints the paired tests."""
    if Path(against).is_dir() and any(Path(against).glob('*.jsonl')) and not (Path(against) / 'ckpt.pt').exists():
        theirs = {name: read_results(Path(against) / f'{name}.jsonl', prompts[name]) for name in names}
    else:
        other = Judged(against, device, dtype, quant, **overrides)
        theirs, _, summaries = run_tasks(other, names, other.folder)
        print('\n'.join([f'{against}:', *table(summaries)]))
    print(f'{init_from} less {against}:')
    for name in names:
        print(f'{name:<16} {paired(TASKS[name].metric, ours[name], theirs[name])}')
    return theirs


def check_knobs():
    """UserError for knobs that do not go together."""
    for wrong, why in ((limit < 0 or num_fewshot < 0 or seed < 0, 'limit, num_fewshot and seed must be >= 0'),
                       (max_new_tokens < 1 or batch_tokens < 1, 'max_new_tokens and batch_tokens must be >= 1'),
                       (judge and not against, 'judge compares two models: give --against=MODEL, too'),
                       (text and (check or against), 'text is judged alone: drop --check and --against'),
                       (stride and not text, 'stride is of a text: give --text=FILE, or drop it')):
        if wrong:
            raise UserError(why)


def main():
    _, overrides = runtime.configure(globals(), GPTConfig)
    check_knobs()
    names = find_tasks(tasks)
    if check:
        print('\n'.join(contamination(names, [path.strip() for path in check.split(',')])))
        return
    if not text:
        for name in names:  # what is missing or damaged is said before a model is loaded
            draw(name)
    judged = Judged(init_from, device, dtype, quant, **overrides)
    folder = Path(out_dir) if out_dir else judged.folder
    report = {'init_from': init_from, 'model': judged.fingerprint, 'dtype': dtype, 'quant': quant, 'seed': seed,
              'limit': limit, 'num_fewshot': num_fewshot, 'torch': torch.__version__}
    if text:
        report |= judge_text(judged)
        print(f'{text}: {as_text("bpb", *report["bpb"])}, {as_text("perplexity", *report["perplexity"])} per token')
    else:
        results, prompts, summaries = run_tasks(judged, names, folder)
        report |= {'tasks': summaries, 'core': core_of(summaries)}
        print('\n'.join([f'{init_from}: 95 % intervals', *table(summaries)]))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ('text.json' if text else 'summary.json')
    runtime.write_atomic(path, lambda file: file.write((json.dumps(report, indent=1) + '\n').encode()))
    if not text and (Path(init_from) / 'metrics.jsonl').is_file():  # a run: for its report, see report.py
        rows = [{key: of[key] for key in ('task', 'metric', 'n')} | {'chance': of['chance'] or None} | dict(
            zip(('value', 'low', 'high'), of['metrics'][of['metric']], strict=True)) for of in summaries]
        runtime.write_atomic(Path(init_from) / 'evaluate.json', lambda file: file.write(json.dumps(rows).encode()))
    if against:
        theirs = compare(names, results, prompts, overrides)
        if judge:
            print(judge_answers([name for name in names if TASKS[name].kind == 'open'], results, theirs))
    print(f'results: {path}')


if __name__ == '__main__':
    runtime.cli(main)
