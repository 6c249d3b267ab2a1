"""
Rows of a file: chats, preferences, labelled steps, prompts and pairs of texts, in the shapes that other libraries
write, checked.

A file is a .json one, a list of rows; a .jsonl one, a row a line, where blank lines are passed over; or a .parquet,
.csv or .tsv one, a table of them. Each may be compressed (.jsonl.gz). A reader takes a file, or a list of those that
follow one another, and returns (rows, skipped): each row with 'where' it is from, and the reasons for which malformed
ones were left out. With strict, the default, such a row raises UserError instead, with file, line and reason; so does a
file without any good row.

A key that decides what is learned is honoured or refused by its name (REFUSED); one that nothing here knows is counted.
The shapes are those of OpenAI, TRL, ShareGPT, axolotl, LLaMA-Factory, ms-swift and verl.
"""
import contextlib
import difflib
import hashlib
import json
import re
from collections import Counter
from pathlib import Path

from chat import ROLES, THOUGHTS
from errors import UserError
from files import csv_rows, format_of, opened, parquet_rows
from grade import GRADERS, check_gold
from progress import counted

# optional fields of a row and their types: the correct answer, the grader that checks it, the problem's steps and kind;
# of preferences: the defect of the rejected answer, whether the label was flipped, how much better the chosen one is;
# a table that functions look things up in, see tools.py
EXTRAS = {'answer': (str, int, float), 'grader': str, 'steps': (int, float), 'kind': str,
          'defect': str, 'flipped': bool, 'margin': (int, float), 'table': dict}
KINDS = {str: 'text', dict: 'an object', bool: 'true or false', (int, float): 'a finite number',
         (str, int, float): 'text or a number'}

# where a row of each shape has its parts, by the names that libraries give them; the first that is there counts
MESSAGES = ('messages', 'conversations', 'conversation')
QUESTION, MORE, ANSWER = ('instruction', 'query', 'question'), ('input', 'context'), ('output', 'response')
CALLERS = ('function_call', 'tool_call')  # who says nothing but the JSON of a call
SPEAKERS = {role: role for role in ROLES} | {
    'human': 'user', **dict.fromkeys(('gpt', 'chatgpt', 'bing', 'bard', 'model', *CALLERS), 'assistant'),
    **dict.fromkeys(('observation', 'function', 'function_response', 'tool_response', 'ipython'), 'tool')}
WEIGHTS = ('weight', 'loss', 'train')  # of a message: whether it is learned, 1 or 0, true or false
TEXTS = ('content', 'value')
OF_MESSAGE = {'role', 'from', *TEXTS, *WEIGHTS, *THOUGHTS, 'tool_calls', 'tool_call_id', 'name'}

# keys that would change what is learned and are not supported: {key: what to do}; a value of IDLE, or 1 for a weight,
# changes nothing and passes
IDLE = (False, 0, '', [], {})
PICTURES = 'only text is learned here'
REFUSED = {
    **dict.fromkeys(('image', 'images', 'video', 'videos', 'audio', 'audios', 'objects'), PICTURES),
    **dict.fromkeys(('completions', 'labels'), 'only reward.py --loss_type=process learns from labels of steps'),
    'functions': 'give "tools"', 'function_call': 'give "tool_calls"',
    'segments': 'give "messages", with "weight": 0 on what is not learned',
    **dict.fromkeys(('weight', 'sample_weight', 'loss_scale'), 'rows have no weights: repeat the row or leave it out')}
OF_MESSAGE_REFUSED = {
    **{key: REFUSED[key] for key in ('image', 'images', 'video', 'audio', 'function_call')},
    'refusal': 'give it as "content"', 'prefix': 'leave the message out or give it whole',
    'channel': 'give thoughts as "reasoning_content"', 'recipient': 'give "tool_calls"',
    'train_detail': 'give "weight": 0 or 1 for the whole message', 'loss_scale': 'give "weight": 0 or 1'}


SKIP = 'mend it, or leave such rows out with --strict=False'
SUFFIXES = ('.json', '.jsonl', '.ndjson', '.csv', '.tsv', '.parquet')  # of files of rows


def is_file_of_rows(dataset):
    """Whether the name of a dataset is that of a file of rows, and no folder's."""
    return format_of(dataset)[1] in SUFFIXES and not Path(dataset).is_dir()


class Skipped(list):
    """The reasons for which rows were left out; unused: {key that nothing here knows: how many rows have it}."""

    def __init__(self):
        self.unused = Counter()


def fraction_of(text):
    """A number from 0 to 1 that the text alone decides: a split by it is the same in whatever order rows come."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / (1 << 48)


def read_chats(path, strict=True):
    """Chats. A row of the file is one of
        {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}, OpenAI's
        {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}, ShareGPT's
        {"instruction": "…", "input": "…", "output": "…"}, Alpaca's; input may be empty or missing
        {"question": "…", "answer": "…"}
        {"prompt": …, "completion": …}, each a text or a list of messages
    which may also have "system", "history", "tools" and "chat_template_kwargs", and becomes {'messages': …}, whose last
    one is the assistant's, and what else it has of EXTRAS. What the chat template is told, {'tools': …}, stands in
    'variables' of the first message. A message may have "weight": 0, which is not learned, thoughts
    ("reasoning_content") and "tool_calls".
    """
    return _read_rows(path, strict, _chat, 'a chat')


def read_prefs(path, strict=True):
    """Pairs of answers, one preferred. A row of the file is one of
        {"prompt": …, "chosen": …, "rejected": …}, each a text or a list of messages; both answers may repeat the prompt
        {"chosen": […], "rejected": […]}, two chats that begin with the same messages
        {"instruction": "…", "input": "…", "chosen": "…", "rejected": "…"}
        {"messages": […], "rejected_response": "…"}, or "conversations" with "chosen" and "rejected"
        {"input": {"messages": […]}, "preferred_output": […], "non_preferred_output": […]}, OpenAI's
    and becomes {'prompt': messages, 'chosen': messages, 'rejected': messages}, and what else it has of EXTRAS. Both
    answers end with the assistant's message, which may be empty in the rejected one alone; a pair of equal ones is
    malformed.
    """
    return _read_rows(path, strict, _pref, 'a preference')


def read_labelled(path, strict=True):
    """Single answers that are good or bad. A row of the file is one of
        {"prompt": …, "completion": …, "label": true}, each a text or a list of messages, TRL's for KTO
        any that `read_chats` knows, with "label" or "kto_tag": the answer is what follows the last user's message
        any that `read_prefs` knows, which becomes two: the chosen answer is good, the rejected one bad
    and becomes {'prompt': messages, 'completion': messages, 'label': bool}, and what else it has of EXTRAS. Good ones
    come first: of good and bad ones in turn, every other row would be of one kind.
    """
    rows, skipped = _read_rows(path, strict, _labelled, 'a labelled answer')
    return sorted((part for row in rows for part in _unpaired(row)), key=lambda row: not row['label']), skipped


def read_steps(path, strict=True):
    """Solutions whose steps are labelled. A row of the file is TRL's
        {"prompt": …, "completions": ["step 1", "step 2", …], "labels": [true, false, …]}
    the prompt a text or a list of messages, and becomes {'prompt': messages, 'completion': the assistant's message, its
    steps on lines of their own, 'labels': one for each line that is not blank: 1, 0, or None on a line before the last
    of its step}, and what else it has of EXTRAS.
    """
    return _read_rows(path, strict, _stepwise, 'a solution with labelled steps')


def read_prompts(path, strict=True):
    """Prompts for a model to answer, whose answers are then rewarded. A row of the file is one of
        {"prompt": …, "answer": "42", "grader": "number"}, the prompt a text or a list of messages, the rest optional
        {"prompt": …, "reward_model": {"style": "rule", "ground_truth": "42"}}, verl's
        any that `read_chats` knows, whose last message is left out
    and becomes {'prompt': messages, 'messages': the prompt and what would be a right answer, empty where none is
    known}, and what else it has of EXTRAS.
    """
    return _read_rows(path, strict, _prompt, 'a prompt')


def read_pairs(path):
    """Pairs of texts, {"source": "…", "target": "…"}, neither empty; always strict -> rows."""
    return _read_rows(path, True, _pair, 'a pair', 'mend it')[0]


def _read_rows(paths, strict, parse, what, remedy=SKIP):
    """The rows of files, each as parse makes them."""
    paths = paths if isinstance(paths, list) else [Path(paths)]
    rows, skipped = [], Skipped()
    for where, item in (item for path in paths for item in counted(_items(path), f'reading {path}', 'rows')):
        try:
            values = _from_line(item) if isinstance(item, bytes) else item
            if not isinstance(values, dict):
                raise UserError(f'not a JSON object but {values!r:.40}')
            row = Row(values, lenient=not strict)
            found, unused = parse(row) | {'where': where}, row.unused()
            rows.append(found)
            skipped.unused.update(unused)
        except UserError as e:
            if strict:
                raise UserError(f'{where}: {e}; {remedy}') from e
            skipped.append(f'{where}: {e}')
    if not rows:
        raise UserError(f'{paths[0]}: ' + (f'none of its {len(skipped):,} rows is {what}; {skipped[0]}' if skipped
                                           else 'no rows: put some there, see read_chats and read_prefs in rows.py'))
    return rows, skipped


def _items(path):
    """Yields (where, line of a JSONL file or what is in a list or table) for the rows of a file."""
    suffix = format_of(path)[1]
    with opened(path) as file:
        if suffix == '.parquet':
            yield from parquet_rows(path, file)
        elif suffix in ('.csv', '.tsv'):
            yield from ((where, _from_cells(cells)) for where, cells in csv_rows(path, file))
        elif suffix == '.json':
            yield from ((f'{path}, row {number}', item) for number, item in enumerate(_from_list(path, file.read()), 1))
        else:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f'{path}, line {number}', line.removesuffix(b'\n')


def _from_list(path, data):
    """The items of a JSON list."""
    try:
        items = json.loads(data.decode('utf-8-sig'))
        if not isinstance(items, list):
            raise ValueError(f'but {type(items).__name__}')
    except (ValueError, RecursionError) as e:
        remedy = '' if data.lstrip()[:1] == b'[' else '; name a file with a JSON object on every line .jsonl'
        raise UserError(f'{path}: not a JSON list ({e}){remedy}') from e
    return items


def _from_cells(cells):
    """A row of a table of texts -> what JSON would have: nothing for an empty cell, and what is no text as such."""
    found = {name: cell for name, cell in cells.items() if cell}
    for name in found.keys() & {*LABELS, 'steps', 'margin', 'flipped'}:
        with contextlib.suppress(ValueError):  # else the reader of the row says what it must be
            found[name] = json.loads(found[name].lower())
    return found


def _from_line(line):
    """A line of a JSONL file -> what it holds."""
    try:
        return json.loads(line.decode('utf-8-sig'))
    except UnicodeDecodeError as e:
        raise UserError(f'not valid UTF-8 (byte {e.start + 1} is 0x{line[e.start]:02x})') from e
    except json.JSONDecodeError as e:
        raise UserError(f'not JSON ({e.msg}, column {e.colno})') from e
    except (ValueError, RecursionError) as e:
        raise UserError(f'not JSON ({e})') from e


class Row:
    """The values of a row, and which of them were asked for: the others are not used, or refused.

    lenient: of a chat what follows its last answer is not used either, instead of being refused.
    """

    def __init__(self, values, lenient=False):
        self.lenient = lenient
        self.values = {key: value for key, value in values.items() if value is not None}  # a table fills with null
        self.asked, self.of_messages = set(), Counter()

    def find(self, *names):
        """The first of these keys that the row has, or None."""
        return next((name for name in names if name in self.values), None)

    def take(self, *names, default=None):
        """The value of the first of these keys that the row has."""
        key = self.find(*names)
        if key is None:
            return default
        self.asked.add(key)
        return self.values[key]

    def text(self, *names):
        """As `take`, a text; '' where there is none."""
        return _text(self.take(*names, default=''), f'"{self.find(*names)}"')

    def unused(self):
        """The keys that nothing asked for; UserError for one of REFUSED."""
        left = [key for key in self.values if key not in self.asked]
        _refuse(REFUSED, {key: self.values[key] for key in left}, '')
        return [*left, *self.of_messages]


def _refuse(table, values, what):
    for key, value in values.items():
        if key in table and not (value == 1 if key.endswith(('weight', 'scale')) else value in IDLE):
            raise UserError(f'{what}"{key}" is not supported: {table[key]}')


def _text(value, what):
    """A str that UTF-8 can spell, its lines ended by \\n and without byte order marks; UserError for anything else."""
    try:
        value.encode()
    except AttributeError:
        raise UserError(f'{what} must be a text, not {value!r:.40}') from None
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair
        raise UserError(f'{what} has half a surrogate pair, which is no character') from None
    return value.replace('\r\n', '\n').replace('\r', '\n').replace('\ufeff', '')


# ----------------------------------------------------------------------------------------------------------------------
# messages

def _content(value, what):
    """A text, or the texts of a list of parts as one."""
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        for part in value:
            if part.get('type', 'text') != 'text' or 'text' not in part:
                raise UserError(f'{what} has a part of type {part.get("type")!r:.40}: {PICTURES}')
        value = ''.join(_text(part['text'], what) for part in value)
    return _text(value, what)


def _call(value, name):
    """The JSON of a call, {"name": …, "arguments": …}, as text or parsed -> as in "tool_calls"."""
    calls = []
    try:
        found = json.loads(value) if isinstance(value, str) else value
        for item in found if isinstance(found, list) else [found]:
            call = item.get('function', item)
            function = {'name': _text(call['name'], f'the "name" of a call of {name}'),
                        'arguments': call.get('arguments', call.get('parameters', {}))}  # Llama calls them parameters
            _text(json.dumps(function['arguments'], ensure_ascii=False), f'a call of {name}')
            calls.append({'type': 'function', 'function': function} | ({'id': item['id']} if 'id' in item else {}))
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f'{name} must hold the JSON of a call, {{"name": …, "arguments": …}}, not {value!r:.40}'
                        ) from None
    return calls


def _message(m, name, row, empty=False):
    """A message in the shape of OpenAI or ShareGPT, checked -> in the former, with what else counts in it."""
    spoken = m.get('role') or m.get('from') if isinstance(m, dict) else m
    role = SPEAKERS.get(spoken) if isinstance(m, dict) and isinstance(spoken, str) else None
    if role is None:
        raise UserError(f'{name} must have a "role" ({", ".join(ROLES)}), not {spoken!r:.40}')
    m = {key: value for key, value in m.items() if value is not None}
    _refuse(OF_MESSAGE_REFUSED, m, f'{name}: ')
    row.of_messages.update(f'{key} of messages' for key in m if key not in OF_MESSAGE)
    key = next((key for key in TEXTS if key in m), 'content')
    calls = m.get('tool_calls') or []
    silent = calls or empty and role == 'assistant'
    content = '' if silent and key not in m else _content(m.get(key), f'the "{key}" of {name}')
    if spoken in CALLERS:
        calls, content = _call(content, name), ''
    found = {'role': role, 'content': content}
    if calls:
        found['tool_calls'] = _call(calls, name)
    for other in ('name', 'tool_call_id'):
        if other in m:
            found[other] = _text(m[other], f'the "{other}" of {name}')
    thoughts = next((m[key] for key in THOUGHTS if m.get(key)), '')
    if thoughts:
        found['reasoning_content'] = _text(thoughts, f'the thoughts of {name}')
    if role == 'assistant' and not content.strip() and not calls and not empty:
        raise UserError(f"{name}, the assistant's, is empty")
    weights = [m[key] for key in WEIGHTS if key in m]
    for weight in weights:
        if weight not in (0, 1):
            raise UserError(f'the weight of {name} must be 0 or 1, not {weight!r:.40}')
    return found if all(weights) else found | {'weight': 0}


def _messages(messages, row, key='messages', answer=True, empty=False):
    """Messages, checked; answer: whether the last one is the assistant's; empty: whether those may be empty."""
    if not isinstance(messages, list) or not messages and answer:
        raise UserError(f'"{key}" must be a list of at least one {{"role": "…", "content": "…"}}')
    of_key = '' if key in MESSAGES else f' of "{key}"'
    found = [_message(m, f'message {number}{of_key}', row, empty) for number, m in enumerate(messages, 1)]
    while row.lenient and not of_key and answer and any(m['role'] == 'assistant' for m in found) and (
            found[-1]['role'] != 'assistant'):  # a user's thanks
        row.of_messages['messages after the last answer'] += 1
        found.pop()
    if answer and found[-1]['role'] != 'assistant':
        last = f'the last message{of_key}' if of_key else 'its last message'
        raise UserError(f"{last} is the {found[-1]['role']}'s: it must be the assistant's")
    return found


def unlearned(messages):
    """Messages of which none is learned."""
    return [m | {'weight': 0} if m['role'] == 'assistant' else m for m in messages]


def read_request(values):
    """What a client asks a server: {"messages": …, "tools": …, "chat_template_kwargs": …} -> messages, as in a row of
    `read_chats`, but whoever's the last one is."""
    row = Row(values)
    messages = row.take('messages')
    if not isinstance(messages, list) or not messages:
        raise UserError('"messages" must be a list of at least one {"role": "…", "content": "…"}')
    return _with_variables(row, _messages(messages, row, answer=False, empty=True))


def _part(row, role, *names):
    """What a row has under a key: a list of messages, one message, or the text of one of this role -> messages."""
    value = row.take(*names)
    if isinstance(value, dict):
        return [value]
    return value if isinstance(value, list) else [{'role': role, 'content': _text(value, f'"{row.find(*names)}"')}]


def _question(row):
    """An instruction and what it is about -> messages."""
    question, more = row.text(*QUESTION), row.text(*MORE)
    return [{'role': 'user', 'content': question + (more and f'\n\n{more}')}]


def _answer(row, *names):
    """The answer to an instruction, with the thoughts that the row may have -> messages."""
    thoughts = row.take(*THOUGHTS)
    answer = _part(row, 'assistant', *names) if names[0] == 'completion' else [
        {'role': 'assistant', 'content': row.text(*names)}]
    if thoughts and answer and isinstance(answer[-1], dict):
        answer = [*answer[:-1], answer[-1] | {'reasoning_content': thoughts}]
    return answer


def _opening(row):
    """What a row has before its messages: the system's and the turns of "history" -> messages."""
    history = row.take('history', default=[])
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise UserError('"history" must be a list of pairs of texts, a question and its answer')
    found = [{'role': 'system', 'content': row.text('system')}] if row.take('system') else []
    for turn in history:
        found += [{'role': role, 'content': text} for role, text in zip(('user', 'assistant'), turn, strict=True)]
    return found


def _with_opening(row, messages):
    opening = _opening(row)
    first = messages[0] if messages and isinstance(messages[0], dict) else {}
    if opening and 'system' in (first.get('role'), first.get('from')):
        raise UserError('it has "system" or "history" and messages that begin with the system\'s: leave one out')
    return opening + messages


def _with_variables(row, messages):
    """The messages; tools and chat_template_kwargs stand in 'variables' of the first, if there are any."""
    tools, found = row.take('tools', default=[]), row.take('chat_template_kwargs', default={})
    try:
        tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools or []
    except ValueError:
        raise UserError(f'"tools" is no JSON: {tools!r:.40}') from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f'"tools" must be a list of objects, the signatures of functions, not {tools!r:.40}')
    if not isinstance(found, dict):
        raise UserError(f'"chat_template_kwargs" must be an object, not {found!r:.40}')
    found = ({'tools': tools} if tools else {}) | found
    return [messages[0] | {'variables': found}, *messages[1:]] if found and messages else messages


def _extras(row):
    """What a row has of EXTRAS, checked."""
    found = {key: row.take(key) for key in EXTRAS if key in row.values}
    for key, value in found.items():
        types = EXTRAS[key]
        if (isinstance(value, bool) != (types is bool) or not isinstance(value, types)
                or isinstance(value, (int, float)) and not abs(value) < 1e300):
            raise UserError(f'"{key}" must be {KINDS[types]}, not {value!r:.40}')
        if isinstance(value, str):
            _text(value, f'"{key}"')
    if found.get('grader', 'number') not in GRADERS:
        raise UserError(f'"grader" is {found["grader"]!r:.40}, not one of {", ".join(GRADERS)}')
    if 'answer' in found:
        check_gold(found['answer'], found.get('grader', 'number'))
    return found


# ----------------------------------------------------------------------------------------------------------------------
# rows

def _pair(row):
    found = {key: _text(row.take(key), f'"{key}"') for key in ('source', 'target')}
    for key, text in found.items():
        if not text:
            raise UserError(f'its {key} is empty: leave the row out')
    return found


LABELS = ('label', 'kto_tag')  # of one answer, whether it is a good one


def _chat(row):
    for key in LABELS:
        value = row.take(key)
        if str(value).lower() == 'false' or value == 0 and not row.find(*MESSAGES):
            raise UserError(f'"{key}" is false, which marks a bad answer: leave the row out; dpo.py --loss_type=kto '
                            'learns from it')
    return _unlabelled_chat(row)


def _unlabelled_chat(row, empty=False):
    if row.find(*MESSAGES):
        messages = row.take(*MESSAGES)
    elif row.find(*QUESTION) and row.find(*ANSWER):
        messages = [*_question(row), *_answer(row, *ANSWER)]
    elif row.find('question') and row.find('answer') and not row.find('prompt'):
        answer = [{'role': 'assistant', 'content': row.text('answer')}]
        messages = [*_question(row), *answer]
        if not row.find('grader'):
            del row.values['answer']  # what is said, not what it is compared with
    elif row.find('prompt') and row.find('completion', 'response'):
        messages = _part(row, 'user', 'prompt') + _answer(row, 'completion', 'response')
    else:
        raise UserError('it needs "messages", or "instruction" and "output", "question" and "answer", or "prompt" and '
                        '"completion"' + (': running text is what train.py learns from' if 'text' in row.values else
                                          f', and has {", ".join(row.values) or "nothing"}'[:200]))
    messages = _messages(_with_opening(row, messages) if isinstance(messages, list) else messages, row, empty=empty)
    opening = next((i for i, m in enumerate(messages) if m['role'] == 'user'), 0)  # of a chat that the assistant opens
    messages = unlearned(messages[:opening]) + messages[opening:]  # read, not learned: nothing asks for it
    return {'messages': _with_variables(row, messages)} | _extras(row)


def _labelled(row):
    if row.find(*PREFERRED):
        return _pref(row)
    label = row.take(*LABELS)
    if label not in (True, False):
        raise UserError(f'it needs "label", true or false, not {label!r:.40}, or "chosen" and "rejected"')
    found = _unlabelled_chat(row, empty=not label)  # a bad answer may say nothing
    messages = found.pop('messages')
    end = 1 + max((i for i, m in enumerate(messages) if m['role'] == 'user'), default=-1)
    if not end:
        raise UserError('it has no "prompt": give what is answered, a text or messages')
    return found | {'prompt': messages[:end], 'completion': messages[end:], 'label': bool(label)}


def _unpaired(row):
    """A labelled answer -> [it]; a pair of answers -> both as labelled ones."""
    if 'label' in row:
        return [row]
    rest = {key: value for key, value in row.items() if key not in ('chosen', 'rejected')}
    return [rest | {'completion': row[key], 'label': key == 'chosen'} for key in ('chosen', 'rejected')]


def _stepwise(row):
    if missing := sorted({'prompt', 'completions', 'labels'} - row.values.keys()):
        raise UserError(f'it has no "{missing[0]}": a row has "prompt", "completions", its steps, and "labels"')
    steps, labels = row.take('completions'), row.take('labels')
    if not isinstance(steps, list) or not isinstance(labels, list) or len(steps) != len(labels) or not steps:
        raise UserError('"completions" and "labels" must be lists, one label for each step')
    lines, line_labels = [], []
    for number, (step, label) in enumerate(zip(steps, labels, strict=True), 1):
        found = [line for line in _text(step, f'step {number} of "completions"').split('\n') if line.strip()]
        if not found:
            raise UserError(f'step {number} of "completions" is empty: leave it and its label out')
        if label not in (0, 1):
            raise UserError(f'label {number} must be true or false, not {label!r:.40}')
        lines += found
        line_labels += [None] * (len(found) - 1) + [int(label)]
    prompt = _messages(_with_opening(row, _part(row, 'user', 'prompt')), row, 'prompt', answer=False)
    if not prompt:
        raise UserError('its "prompt" is empty: give what the steps solve, a text or messages')
    return {'prompt': _with_variables(row, prompt), 'completion': [{'role': 'assistant', 'content': '\n'.join(lines)}],
            'labels': line_labels} | _extras(row)


HUMAN = re.compile(r'\n\n(Human|Assistant): ?')  # whose turn begins, in Anthropic's transcripts


def _transcript(text):
    """'\\n\\nHuman: …\\n\\nAssistant: …' -> messages."""
    parts = HUMAN.split(text)[1:]
    return [{'role': {'Human': 'user', 'Assistant': 'assistant'}[who], 'content': said}
            for who, said in zip(parts[::2], parts[1::2], strict=True)]


# what a pair has its answers under, in one of the shapes of `read_prefs`
PREFERRED = ('chosen', 'rejected', 'preferred_output', 'rejected_response', 'rejected_messages')


def _rename_pref(row):
    """Gives what a preference of OpenAI's or ms-swift's shape has the keys of TRL's."""
    if row.find('preferred_output'):
        given = Row(row.take('input', default={}) if isinstance(row.values.get('input'), dict) else {})
        values = {'prompt': given.take('messages'), 'tools': given.take('tools'),
                  'chosen': row.take('preferred_output'), 'rejected': row.take('non_preferred_output')}
        row.asked |= values.keys()
        row.values |= {key: value for key, value in values.items() if value is not None}
    elif row.find('rejected_response', 'rejected_messages') and row.find(*MESSAGES):  # the chat is chosen
        row.values['chosen'] = row.take(*MESSAGES)
        row.values['rejected'] = row.take('rejected_response', 'rejected_messages')
        if isinstance(row.values['rejected'], str) and isinstance(row.values['chosen'], list):
            row.values['prompt'], row.values['chosen'] = row.values['chosen'][:-1], row.values['chosen'][-1:]
        for key in MESSAGES:
            row.values.pop(key, None)


def _pref(row):
    _rename_pref(row)
    if missing := sorted({'chosen', 'rejected'} - row.values.keys()):
        labelled, near = row.find(*LABELS), difflib.get_close_matches(missing[0], row.values, 1)
        raise UserError(f'it has no "{missing[0]}"' + (f' but a "{labelled}": dpo.py --loss_type=kto learns from it'
                                                       if labelled else f' but a "{near[0]}"' if near else ''))
    answers = [_part(row, 'assistant', key) for key in ('chosen', 'rejected')]
    prompt = None
    if all(isinstance(row.values[key], str) and HUMAN.match(row.values[key]) for key in ('chosen', 'rejected')):
        answers = [_transcript(row.values[key]) for key in ('chosen', 'rejected')]
    elif row.find('prompt', *MESSAGES):
        prompt = _part(row, 'user', 'prompt', *MESSAGES)
    elif row.find(*QUESTION):
        prompt = _question(row)
    chosen, rejected = (_messages(messages, row, key, empty=key == 'rejected')
                        for messages, key in zip(answers, ('chosen', 'rejected'), strict=True))
    if prompt is not None:
        prompt = _messages(_with_opening(row, prompt), row, 'prompt', answer=False)
        prompt, chosen, rejected = _without_prompt(prompt, chosen, rejected)
    else:
        same = 0
        while same < min(len(chosen), len(rejected)) - 1 and chosen[same] == rejected[same]:
            same += 1
        prompt, chosen, rejected = _with_opening(row, chosen[:same]), chosen[same:], rejected[same:]
    if not any(m['role'] == 'user' for m in prompt):
        raise UserError('it has no "prompt": give what both answers answer, a text or messages')
    if chosen == rejected:
        raise UserError('"chosen" and "rejected" are equal: nothing is preferred')
    return {'prompt': _with_variables(row, prompt), 'chosen': chosen, 'rejected': rejected} | _extras(row)


def _without_prompt(prompt, chosen, rejected):
    """Answers that are whole chats -> (what both answer, the two answers alone).

    Both may begin with the prompt, with its last messages, or with a longer history that ends with the prompt. Messages
    are compared without the blanks around their texts. UserError where an answer has other turns of a user or system.
    """
    def plain(messages):
        return [m | {'content': m['content'].strip()} for m in messages]

    asked, a, b = plain(prompt), plain(chosen), plain(rejected)
    for n in range(len(prompt), 0, -1):
        if a[:n] == b[:n] == asked[-n:] and n < min(len(a), len(b)):
            return prompt, chosen[n:], rejected[n:]
    if not {m['role'] for m in chosen + rejected} & {'system', 'developer', 'user'}:
        return prompt, chosen, rejected
    for n in range(min(len(a), len(b)) - 1, len(prompt), -1):
        if a[:n] == b[:n] and a[n - len(prompt):n] == asked:
            return chosen[:n], chosen[n:], rejected[n:]
    raise UserError('"chosen" or "rejected" has turns of a user or system that are not those of "prompt": give the '
                    'answers alone, or leave "prompt" out where they are whole chats')


def _prompt(row):
    if 'prompt' not in row.values or row.values.keys() & {*MESSAGES, 'completion', 'response'}:
        found = _chat(row)
        if len(found['messages']) < 2:
            raise UserError('it has an answer alone: give what the assistant is to answer before it')
        return {'prompt': found['messages'][:-1]} | found
    rule = row.take('reward_model', default={})  # verl's
    if isinstance(rule, dict) and rule.get('style', 'rule') == 'rule' and 'ground_truth' in rule:
        row.values.setdefault('answer', rule['ground_truth'])
    elif rule:
        raise UserError(f'"reward_model" is {rule!r:.60}: only a rule is known, {{"style": "rule", "ground_truth": '
                        '"42"}')
    if 'answer' not in row.values and row.find('solution', 'ground_truth'):
        raise UserError(f'it has no "answer" but a "{row.find("solution", "ground_truth")}": call the correct answer '
                        '"answer"')
    prompt = _messages(_with_opening(row, _part(row, 'user', 'prompt')), row, 'prompt', answer=False)
    prompt, found = _with_variables(row, prompt), _extras(row)
    if not prompt or prompt[-1]['role'] == 'assistant':
        raise UserError('its "prompt" must end with what the assistant is to answer')
    gold = {'role': 'assistant', 'content': str(found.get('answer', ''))}
    return {'prompt': prompt, 'messages': [*prompt, gold]} | found
