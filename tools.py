"""
Functions of a user's Python file that a model may call, with turns of their own for calls and results.

    tools = load_tools('mine.py, other.py:lookup')       all functions of one file, and one of another
    tools.signatures                                     what the chat template shows to the model, JSON schemas
    tools.answer('{"name": "lookup", "arguments": {"item": "pear"}}', row)        '17', or 'error: …'
    ids = tool_turn(tokenizer, signatures, [('lookup', '17')])        the turns that go back to the model

A function needs a type hint and a line of its docstring's Args for every parameter (Google's style); what the model is
shown is what `transformers.utils.get_json_schema` makes of them. A parameter named `row`, without a type hint, is not
the model's to give: it gets the row of the data that the question is from. A result that is no text becomes JSON.

Whatever goes wrong in a call is an answer that the model can read: 'error: …'.
Papers: Toolformer (arXiv:2302.04761), ReAct (arXiv:2210.03629).
"""
import ast
import functools
import importlib.util
import inspect
import json
import re
import sys
import threading
import types
import typing
from dataclasses import dataclass
from pathlib import Path

from chat import MARKS, read_call, read_calls
from errors import UserError

TIME_LIMIT = 5.0  # seconds that a call may take
RESULT_LENGTH = 1000  # characters of a result that the model gets to read
TYPES = {str: 'string', int: 'integer', float: 'number', bool: 'boolean', list: 'array', tuple: 'array', dict: 'object',
         type(None): 'null'}
JSON_TYPES = {'string': str, 'integer': int, 'number': (int, float), 'boolean': bool, 'array': list, 'object': dict,
              'null': type(None)}


def load_module(path, key):
    """The module in a user's Python file; UserError that names the knob `key` for whatever that raises."""
    try:
        if (folder := str(Path(path).resolve().parent)) not in sys.path:
            sys.path.append(folder)  # it may import what lies beside it
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:  # the user's own code can raise anything
        raise UserError(f'{key}: {path}: {type(error).__name__}: {error}') from None
    return module


# ----------------------------------------------------------------------------------------------------------------------
# signatures

def schema_of(hint):
    """A type hint -> its JSON schema; ValueError for one that has none."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is typing.Any:
        return {}
    if hint in TYPES:
        return {'type': TYPES[hint]}
    if origin is typing.Literal:
        kinds = list(dict.fromkeys(TYPES[type(value)] for value in args))
        return {'type': kinds[0] if len(kinds) == 1 else kinds, 'enum': list(args)}
    if origin in (typing.Union, types.UnionType):
        parts = [schema_of(arg) for arg in args if arg is not type(None)]
        if len(parts) == 1:
            found = parts[0]
        elif all(part.keys() == {'type'} for part in parts):
            kinds = sorted({part['type'] for part in parts})
            found = {'type': kinds[0] if len(kinds) == 1 else kinds}
        else:
            found = {'anyOf': parts}
        return found | ({'nullable': True} if type(None) in args else {})
    if origin is list:
        return {'type': 'array', 'items': schema_of(args[0])}
    if origin is dict:
        return {'type': 'object', 'additionalProperties': schema_of(args[1])}
    raise ValueError(f'{hint} has no JSON schema: take str, int, float, bool, list, dict, Literal or a union of these')


def sections(doc):
    """A docstring in Google's style -> (description, {parameter: its description}, what is returned or None)."""
    description, *parts = re.split(r'^[ \t]*(Args|Returns|Raises):[ \t]*$', doc, flags=re.M)
    found = dict(zip(parts[::2], parts[1::2], strict=True))
    lines = [line for line in found.get('Args', '').split('\n') if line.strip()]
    indents = [len(line) - len(line.lstrip()) for line in lines]
    given = []
    for line, indent in zip(lines, indents, strict=True):
        name = re.match(r'\s*(\w+):\s*', line) if indent == min(indents) else None
        if name:
            given.append([name[1], line[name.end():].strip()])
        elif given:
            given[-1][1] += f' {line.strip()}'
    return description.strip(), dict(given), found['Returns'].strip() if 'Returns' in found else None


def signature_of(function):
    """A function -> its JSON schema, as chat templates take it; ValueError says what is missing."""
    description, given, returned = sections(inspect.getdoc(function) or '')
    if not description:
        raise ValueError('it has no docstring, which tells the model what it is for')
    hints = typing.get_type_hints(function)
    properties, required = {}, []
    for name, parameter in inspect.signature(function).parameters.items():
        if name == 'row' and name not in hints:
            continue
        if name not in hints:
            raise ValueError(f'its parameter {name!r} has no type hint')
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ValueError(f'its parameter {name!r} cannot be given by name')
        if name not in given:
            raise ValueError(f'its docstring does not describe {name!r}: add Args: and {name}: …')
        found, text = schema_of(hints[name]), given[name]
        if choices := re.search(r'\(choices:\s*(.*?)\)\s*$', text, re.I):
            found, text = found | {'enum': json.loads(choices[1])}, text[:choices.start()].strip()
        properties[name] = found | {'description': text}
        required += [name] * (parameter.default is parameter.empty)
    parameters = {'type': 'object', 'properties': properties} | ({'required': required} if required else {})
    found = {'name': function.__name__, 'description': description, 'parameters': parameters}
    if 'return' in hints:
        found['return'] = schema_of(hints['return']) | ({'description': returned} if returned else {})
    return {'type': 'function', 'function': found}


def fits(value, schema):
    """Whether a JSON value is of a schema of `schema_of`."""
    if value is None and schema.get('nullable'):
        return True
    if 'anyOf' in schema:
        return any(fits(value, part) for part in schema['anyOf'])
    kinds = schema.get('type', [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(isinstance(value, JSON_TYPES[kind]) and isinstance(value, bool) <= (kind == 'boolean')
                         for kind in kinds):
        return False
    inside = value if isinstance(value, list) else value.values() if isinstance(value, dict) else ()
    of = schema.get('items', schema.get('additionalProperties', {}))
    return ('enum' not in schema or value in schema['enum']) and all(fits(item, of) for item in inside)


# ----------------------------------------------------------------------------------------------------------------------
# calls

@dataclass
class Tools:
    """What a model may call. calculator: <tool>…</tool> within its text, see `rollout.Forcing`; functions: by name, in
    turns of their own, see `Tools.answer`; spec: the knob, for messages."""
    calculator: bool
    functions: dict
    spec: str

    @functools.cached_property
    def signatures(self):
        return [signature_of(function) for function in self.functions.values()]

    @functools.cached_property
    def parameters(self):
        return {of['function']['name']: of['function']['parameters'] for of in self.signatures}

    def rows(self, rows):
        """Rows as `load_chats` or `load_prompts` gives them, with the signatures of the functions where they have no
        "tools" of their own, and with the 'prompt' ending before the first call of what was the answer.

        UserError for a row that lists a tool that is not here.
        """
        return [self._row(row) for row in rows] if self.functions else rows

    def _row(self, row):
        messages = row.get('messages') or row['prompt']  # a prompt alone is what sample.py has
        variables = messages[0].get('variables', {})
        for name in names_of(variables.get('tools', [])):
            if name not in self.functions:
                raise UserError(f'{row["where"]}: it lists the tool {name!r}, which tools={self.spec!r} does not have, '
                                f'only {", ".join(self.functions)}: add it there or take it out of the row')
        first = {'variables': {'tools': self.signatures} | variables}
        asked = list(row.get('prompt') or row['messages'][:-1])
        while len(asked) > 1 and asked[-1]['role'] in ('assistant', 'tool'):
            asked.pop()
        return row | {key: [found[0] | first, *found[1:]]
                      for key, found in (('messages', row.get('messages')), ('prompt', asked)) if found}

    def answer(self, text, row=None):
        """What stands between <tool_call> and </tool_call> -> (the name in it, the result, a text).

        row: what the data has of the question; where it lists "tools", only these can be called.
        """
        try:
            name, arguments = read_call(text)
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            if not isinstance(arguments, dict):
                raise ValueError
        except (ValueError, RecursionError):
            return 'unknown', 'error: this is not {"name": …, "arguments": {…}} in JSON'
        row = row or {}
        messages = row.get('prompt') or row.get('messages') or [{}]
        listed = messages[0].get('variables', {}).get('tools')
        known = names_of(listed) if listed else list(self.functions)
        if name not in known:
            return name, f'error: there is no function {name!r:.40}, only {", ".join(known)}'
        function = self.functions[name]
        if problem := wrong_arguments(arguments, self.parameters[name]):
            return name, f'error: {problem}'
        if 'row' in {*inspect.signature(function).parameters} - {*self.parameters[name]['properties']}:
            arguments = arguments | {'row': row}
        return name, as_text(limited(function, arguments))


def names_of(signatures):
    """The names of functions by their signatures."""
    return [of.get('function', of).get('name', '') for of in signatures]


def wrong_arguments(arguments, parameters):
    """What is wrong with the arguments of a call, in words; '' if nothing is."""
    properties = parameters['properties']
    for name in parameters.get('required', []):
        if name not in arguments:
            return f'the argument {name!r} is missing'
    for name, value in arguments.items():
        if name not in properties:
            return f'there is no argument {name!r:.40}, only {", ".join(properties)}'
        if not fits(value, properties[name]):
            wanted = {key: properties[name][key] for key in ('type', 'anyOf', 'enum') if key in properties[name]}
            return f'{name!r} must be {json.dumps(wanted)}, not {json.dumps(value):.60}'
    return ''


def limited(function, arguments):
    """What a call returns, or 'error: …' if it raises or takes longer than TIME_LIMIT.

    A call that hangs is left alone, in a thread that does not keep the program from ending.
    """
    done = []

    def work():
        try:
            done.append(function(**arguments))
        except BaseException as error:  # the user's own code can raise anything
            done.append(f'error: {type(error).__name__}: {error}')
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(TIME_LIMIT)
    return done[0] if done else f'error: it took more than {TIME_LIMIT:g} s'


def as_text(result):
    """A result as the text that the model reads: JSON if it is none, and no more than RESULT_LENGTH characters."""
    try:
        text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = f'{result}'
    text = MARKS.sub('\ufffd', text.encode(errors='replace').decode())
    return text if len(text) <= RESULT_LENGTH else f'{text[:RESULT_LENGTH]} …'


def load_tools(spec):
    """The knob `tools` -> Tools. spec: False; True, the calculator; or a list of True, FILE.py and FILE.py:function
    with commas between. UserError with one line for what cannot be called."""
    if isinstance(spec, bool):
        return Tools(spec, {}, f'{spec}')
    calculator, functions = False, {}
    for part in map(str.strip, spec.split(',')):
        path, _, only = part.partition('.py:')
        path += '.py' * bool(only)
        if part == 'True':
            calculator = True
            continue
        if not path.endswith('.py') or not Path(path).is_file():
            raise UserError(f'tools={spec}: {path!r} is no Python file: give True (the calculator), FILE.py or '
                            'FILE.py:function')
        module = load_module(path, 'tools')
        names = [node.name for node in ast.parse(Path(path).read_text(encoding='utf-8')).body
                 if isinstance(node, ast.FunctionDef) and not node.name.startswith('_')]
        names = [name for name in names if name == only or not only]
        if not names:
            raise UserError(f'tools={spec}: {path} has no function{f" {only!r}" * bool(only)} without _ before it')
        for name in names:
            if name in functions:
                raise UserError(f'tools={spec}: {path}: there are two functions {name!r}: rename one')
            functions[name] = getattr(module, name)
            try:
                signature_of(functions[name])
            except (ValueError, KeyError, TypeError, NameError) as error:
                raise UserError(f'tools={spec}: {path}: {name}: {error}') from None
    return Tools(calculator, functions, spec)


# ----------------------------------------------------------------------------------------------------------------------
# turns

def turn_starts(tokenizer, ids):
    """Where the assistant's turns begin in the ids of an answer: at 0, and after each header of a turn of its own,
    which follows the results of calls."""
    header, starts, at = tokenizer.turn_header, [0], -1
    for _ in range(ids.count(header[0]) if header else 0):
        at = ids.index(header[0], at + 1)
        if ids[at:at + len(header)] == header:
            starts.append(at + len(header))
    return starts


def tool_turn(tokenizer, signatures, results):
    """Results of calls, pairs (name, text) -> the ids between the end of the assistant's turn that called and its next
    one, by the chat template. UserError where the template has no such turns."""
    ids, _, end = _rendered(tokenizer, signatures, results)
    return ids[end:]


def _rendered(tokenizer, signatures, results):
    """A chat in which functions of these names are called and have these results -> its ids to the header of the
    assistant's next turn, and where the turn with the calls begins and ends."""
    calls = [{'id': f'call{n:05}', 'type': 'function', 'function': {'name': name, 'arguments': {'x': 1}}}
             for n, (name, _) in enumerate(results)]
    ids, _ = tokenizer.chat_ids([
        {'role': 'user', 'content': '?', 'variables': {'tools': signatures}},
        {'role': 'assistant', 'content': '', 'tool_calls': calls},
        *({'role': 'tool', 'name': name, 'tool_call_id': call['id'], 'content': text}
          for (name, text), call in zip(results, calls, strict=True))], generate=True)
    turns = turn_starts(tokenizer, ids)[1:]
    ends = [i for i in range(turns[0], len(ids)) if ids[i] in tokenizer.turn_ids] if len(turns) == 2 else []
    if not ends or turns[1] != len(ids):
        raise UserError('the chat template has no turns for calls and their results: take another model, or sft.py '
                        '--chat_template=hermes')
    return ids, turns[0], ends[0] + 1


def messages_of(said, results):
    """A turn of the assistant with calls, a text, and their results, pairs (name, text) -> messages. A turn with a call
    that is not in JSON stays text."""
    turns = [{'role': 'tool', 'name': name, 'content': text} for name, text in results]
    try:
        calls = [read_call(text) for text in read_calls(said)]
    except (ValueError, RecursionError):
        return [{'role': 'assistant', 'content': said}, *turns]
    calls = [{'type': 'function', 'function': {'name': name, 'arguments': arguments}} for name, arguments in calls]
    return [{'role': 'assistant', 'content': said.partition('<tool_call>')[0].strip(), 'tool_calls': calls}, *turns]


def check_template(tokenizer, tools):
    """UserError unless the chat template writes calls and results in a way that is read here."""
    try:
        name = next(iter(tools.functions))
        ids, start, end = _rendered(tokenizer, tools.signatures, [(name, '4321')])
        said = tokenizer.decode(ids[start:end])
        if '4321' not in tokenizer.decode(ids[end:]) or [*map(read_call, read_calls(said))] != [(name, {'x': 1})]:
            raise UserError(f'the chat template writes a call as {said!r:.80}, not as <tool_call>{{…}}</tool_call>: '
                            'take a model whose template does, or sft.py --chat_template=hermes')
    except ValueError as error:  # a UserError, or of what stands in <tool_call> where it is no JSON
        raise UserError(f'tools={tools.spec}: tokenizer {tokenizer.name}: {error}') from None
