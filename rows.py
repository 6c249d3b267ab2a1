"""
Rows of a file: chats, preferences, prompts and pairs of texts, in the shapes that other libraries write, checked.

A file is a .json one, a list of rows, or a .jsonl one, a row a line; blank lines are passed over. A reader returns
(rows, skipped): each row with 'where' it is from, and the reasons for which malformed ones were left out. With strict
such a row raises UserError instead, with file, line and reason; so does a file without any good row.
"""
import hashlib
import json
from pathlib import Path

from grade import GRADERS
from tokenizer import ROLES, UserError

# optional fields of a row and their types: the correct answer, the grader that checks it, the problem's steps and kind;
# of preferences: the defect of the rejected answer, whether the label was flipped, how much better the chosen one is
EXTRAS = {'answer': (str, int, float), 'grader': str, 'steps': (int, float), 'kind': str,
          'defect': str, 'flipped': bool, 'margin': (int, float)}
KINDS = {str: 'text', bool: 'true or false', (int, float): 'a finite number', (str, int, float): 'text or a number'}


def fraction_of(text):
    """A number from 0 to 1 that the text alone decides: a split by it is the same in whatever order rows come."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / (1 << 48)


def read_chats(path, strict=True):
    """Chats. A row of the file is one of
        {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
        {"instruction": "…", "input": "…", "output": "…"}, Alpaca's; input may be empty or missing
        {"prompt": …, "completion": …}, each a text or a list of messages
    and becomes {'messages': …}, whose last one is the assistant's, and what else it has of EXTRAS.
    """
    return _read_rows(path, strict, _chat, 'a chat')


def read_prefs(path, strict=True):
    """Pairs of answers, one preferred. A row of the file is one of
        {"prompt": …, "chosen": …, "rejected": …}, each a text or a list of messages; both answers may repeat the prompt
        {"chosen": […], "rejected": […]}, two chats that begin with the same messages
        {"instruction": "…", "input": "…", "chosen": "…", "rejected": "…"}
    and becomes {'prompt': messages, 'chosen': messages, 'rejected': messages}, and what else it has of EXTRAS. Both
    answers end with the assistant's message; a pair of equal ones is malformed.
    """
    return _read_rows(path, strict, _pref, 'a preference')


def read_prompts(path, strict=True):
    """Prompts for a model to answer, whose answers are then rewarded. A row of the file is one of
        {"prompt": …, "answer": "42", "grader": "number"}, the prompt a text or a list of messages, the rest optional
        any that `read_chats` knows, whose last message is left out
    and becomes {'prompt': messages, 'messages': the prompt and what would be a right answer, empty where none is
    known}, and what else it has of EXTRAS.
    """
    return _read_rows(path, strict, _prompt, 'a prompt')


def read_pairs(path):
    """Pairs of texts, {"source": "…", "target": "…"}, neither empty; always strict -> rows."""
    return _read_rows(path, True, _pair, 'a pair')[0]


def _read_rows(path, strict, parse, what):
    """The rows of a file, each as parse makes them."""
    path, rows, skipped = Path(path), [], []
    listed = path.suffix == '.json'
    try:
        data = path.read_bytes()
        items = json.loads(data.decode('utf-8-sig')) if listed else data.split(b'\n')
        if not isinstance(items, list):
            raise ValueError(f'but {type(items).__name__}')
    except OSError as e:
        raise UserError(f'{path}: {e.strerror}') from e
    except (ValueError, RecursionError) as e:
        raise UserError(f'{path}: not a JSON list ({e}); name a file with a JSON object on every line .jsonl') from e
    for number, item in enumerate(items, 1):
        if not listed and not item.strip():
            continue
        where = f'{path}, {"row" if listed else "line"} {number}'
        try:
            row = item if listed else _from_line(item)
            if not isinstance(row, dict):
                raise UserError(f'not a JSON object but {row!r:.40}')
            row = {key: value for key, value in row.items() if value is not None}  # a table fills its columns with null
            rows.append(parse(row) | {'where': where})
        except UserError as e:
            if strict:
                raise UserError(f'{where}: {e}') from e
            skipped.append(f'{where}: {e}')
    if not rows:
        raise UserError(f'{path}: ' + (f'none of its {len(skipped):,} rows is {what}; {skipped[0]}' if skipped
                                       else 'no rows: put some there, see read_chats and read_prefs in rows.py'))
    return rows, skipped


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


def _text(value, what):
    """A str that UTF-8 can spell; UserError for anything else."""
    try:
        value.encode()
    except AttributeError:
        raise UserError(f'{what} must be a text, not {value!r:.40}') from None
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair
        raise UserError(f'{what} has half a surrogate pair, which is no character') from None
    return value


def _part(row, key, role):
    """What a row has under a key, a list of messages or the text of one of this role -> messages."""
    value = row[key]
    return value if isinstance(value, list) else [{'role': role, 'content': _text(value, f'"{key}"')}]


def _instruction(row):
    """Alpaca's instruction and input -> messages."""
    prompt, more = _text(row['instruction'], '"instruction"'), _text(row.get('input', ''), '"input"')
    return [{'role': 'user', 'content': prompt + (more and f'\n\n{more}')}]


def _messages(messages, key='messages', answer=True):
    """Messages, checked; answer: whether the last one is the assistant's."""
    if not isinstance(messages, list) or not messages and answer:
        raise UserError(f'"{key}" must be a list of at least one {{"role": "…", "content": "…"}}')
    of_key = '' if key == 'messages' else f' of "{key}"'
    found = []
    for number, m in enumerate(messages, 1):
        name = f'message {number}{of_key}'
        if not isinstance(m, dict) or m.get('role') not in ROLES:
            wrong = repr(m.get('role') if isinstance(m, dict) else m)
            raise UserError(f'{name} must have a "role" ({", ".join(ROLES)}), not {wrong:.40}')
        content = _text(m.get('content'), f'the "content" of {name}')
        if m['role'] == 'assistant' and not content.strip():
            raise UserError(f"{name}, the assistant's, is empty")
        found.append({'role': m['role'], 'content': content})
    if answer and found[-1]['role'] != 'assistant':
        last = f'the last message{of_key}' if of_key else 'its last message'
        raise UserError(f"{last} is the {found[-1]['role']}'s: it must be the assistant's")
    return found


def _extras(row):
    """What a row has of EXTRAS, checked."""
    found = {key: row[key] for key in EXTRAS if key in row}
    for key, value in found.items():
        types = EXTRAS[key]
        if (isinstance(value, bool) != (types is bool) or not isinstance(value, types)
                or isinstance(value, (int, float)) and not abs(value) < 1e300):
            raise UserError(f'"{key}" must be {KINDS[types]}, not {value!r:.40}')
        if isinstance(value, str):
            _text(value, f'"{key}"')
    if found.get('grader', 'number') not in GRADERS:
        raise UserError(f'"grader" is {found["grader"]!r:.40}, not one of {", ".join(GRADERS)}')
    return found


def _pair(row):
    found = {key: _text(row.get(key), f'"{key}"') for key in ('source', 'target')}
    for key, text in found.items():
        if not text:
            raise UserError(f'its {key} is empty: leave the row out')
    return found


def _chat(row):
    if 'messages' in row:
        messages = row['messages']
    elif {'instruction', 'output'} <= row.keys():
        messages = [*_instruction(row), {'role': 'assistant', 'content': _text(row['output'], '"output"')}]
    elif {'prompt', 'completion'} <= row.keys():
        messages = _part(row, 'prompt', 'user') + _part(row, 'completion', 'assistant')
    else:
        raise UserError('it needs "messages", or "instruction" and "output", or "prompt" and "completion"')
    return {'messages': _messages(messages)} | _extras(row)


def _pref(row):
    if missing := sorted({'chosen', 'rejected'} - row.keys()):
        raise UserError(f'it has no "{missing[0]}"')
    chosen, rejected = (_messages(_part(row, key, 'assistant'), key) for key in ('chosen', 'rejected'))
    if 'prompt' in row:
        prompt = _messages(_part(row, 'prompt', 'user'), 'prompt', answer=False)
        for n in range(len(prompt), 0, -1):  # answers that are whole chats, from the prompt or its last messages on
            if chosen[:n] == rejected[:n] == prompt[-n:] and n < min(len(chosen), len(rejected)):
                chosen, rejected = chosen[n:], rejected[n:]
                break
    elif 'instruction' in row:
        prompt = _messages(_instruction(row), 'prompt', answer=False)
    else:
        same = 0
        while same < min(len(chosen), len(rejected)) - 1 and chosen[same] == rejected[same]:
            same += 1
        prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
    if not any(m['role'] == 'user' for m in prompt):
        raise UserError('it has no "prompt": give what both answers answer, a text or messages')
    if chosen == rejected:
        raise UserError('"chosen" and "rejected" are equal: nothing is preferred')
    return {'prompt': prompt, 'chosen': chosen, 'rejected': rejected} | _extras(row)


def _prompt(row):
    if 'prompt' not in row or row.keys() & {'messages', 'completion'}:
        found = _chat(row)
        return {'prompt': found['messages'][:-1]} | found
    prompt, found = _messages(_part(row, 'prompt', 'user'), 'prompt', answer=False), _extras(row)
    if not prompt or prompt[-1]['role'] == 'assistant':
        raise UserError('its "prompt" must end with what the assistant is to answer')
    gold = {'role': 'assistant', 'content': str(found.get('answer', ''))}
    return {'prompt': prompt, 'messages': [*prompt, gold]} | found
