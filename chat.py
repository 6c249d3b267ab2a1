"""
Chats -> text, by a chat template in Jinja: the one that a model comes with, or one of TEMPLATES.

    template = ChatTemplate(TEMPLATES['chatml'], markers=['<|im_start|>', '<|im_end|>'], ends=['<|im_end|>'])
    for text, learned in template.segments([{'role': 'user', 'content': 'Hi'}], generate=True): …

A template is a stranger's program: it runs in Jinja's sandbox, with the filters and functions that transformers has
(https://huggingface.co/docs/transformers/chat_templating_writing). `Tokenizer.chat_ids` makes ids of the text.

What somebody typed must never become a token of the template: a marker in a message's text is broken up with GUARD,
which the tokenizer takes out after it has cut the text at its special tokens. GUARD and the other marks below are
noncharacters of Unicode; a text that has one is refused.
"""
import datetime
import functools
import json
import re

from errors import UserError, one_line

ROLES = ('system', 'developer', 'user', 'assistant', 'tool')
THOUGHTS = ('reasoning_content', 'thinking', 'reasoning')  # what a message's thoughts are called

GUARD = '\ufdd0'  # after the first character of a marker that is quoted
RESULT, RESULT_END = '\ufdd1\ufdd2'  # around the result of a call of the calculator
LEARN, LEARN_END = '\ufdd3\ufdd4'  # around what {% generation %} … {% endgeneration %} holds
UNLEARNED = '\ufdd5'  # after the first character of what an assistant says that is not learned
MARKS = re.compile('[\ufdd0-\ufdd5]')

# What an assistant writes to have something calculated, and the same with the result that is put in after it.
CALL = re.compile('<tool>((?:(?!</?tool>).)*)</tool>', re.S)
ANSWERED_CALL = re.compile(rf'({CALL.pattern})(\[[^][\n]*\])', re.S)
# What it writes to have a function called, as Hermes and Qwen do; one that is not closed ends with the text.
FUNCTION_CALL = re.compile(r'<tool_call>(.*?)(?:</tool_call>|\Z)', re.S)

CHATML_TURN = "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
ASKED = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TEMPLATES = {
    'chatml': '{% for message in messages %}' + CHATML_TURN + '{% endfor %}' + ASKED,
    # ChatML with tools, as Hermes and Qwen write them: signatures in the system's turn, calls and results in tags
    'hermes': (
        "{% if tools %}{{ '<|im_start|>system\n' }}"
        "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n\n' }}{% endif %}"
        "{{ 'You may call these functions:\n<tools>\n' }}{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}"
        "{{ '</tools>\nCall one with <tool_call>\n{\"name\": …, \"arguments\": …}\n</tool_call><|im_end|>\n' }}"
        "{% endif %}"
        "{% for message in messages %}{% if message['role'] == 'tool' %}"
        "{{ '<|im_start|>tool\n<tool_response>\n' + message['content'] + '\n</tool_response><|im_end|>\n' }}"
        "{% elif message['tool_calls'] %}{{ '<|im_start|>assistant\n' + message['content'] }}"
        "{% for call in message['tool_calls'] %}{% set call = call.function or call %}"
        "{{ '\n' if message['content'] or not loop.first }}"
        "{{ '<tool_call>\n{\"name\": ' + call.name | tojson + ', \"arguments\": ' + call.arguments | tojson"
        " + '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
        "{% elif not (tools and loop.first and message['role'] == 'system') %}" + CHATML_TURN
        + '{% endif %}{% endfor %}' + ASKED),
    # Gemma's, which has no system: its text begins the first turn
    'gemma': (
        "{{ bos_token }}{% set system = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' %}"
        "{% for message in messages if message['role'] != 'system' %}{{ '<start_of_turn>' + "
        "('model' if message['role'] == 'assistant' else message['role']) + '\n' + (system if loop.first else '') + "
        "message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"),
    # plain text, which needs no token but the end of a text: Stanford Alpaca's prompt
    'alpaca': (
        "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n\n' }}{% else %}"
        "{{ 'Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n' }}{% endif %}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '### Instruction:\n' + message['content'] + '\n\n' }}{% elif message['role'] == 'assistant' %}"
        "{{ '### Response:\n' + message['content'] + eos_token + '\n\n' }}"
        "{% elif message['role'] != 'system' or not loop.first %}"
        "{{ raise_exception('it has no place for a turn of the ' + message['role']) }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"),
}


def read_calls(text):
    """What stands in the function calls of an assistant's turn, texts; those in its thoughts do not count."""
    return FUNCTION_CALL.findall(text.rpartition('</think>')[2])


def read_call(text):
    """'{"name": …, "arguments": …}', or Llama's "parameters" -> (name, arguments, as they are); ValueError if it is no
    call."""
    found = json.loads(text)
    if not isinstance(found, dict) or not isinstance(found.get('name'), str):
        raise ValueError('no object with a "name"')
    return found['name'], found.get('arguments', found.get('parameters', {}))


def chatml(system=None):
    """ChatML with a default system message for chats that have none."""
    if system is None:
        return TEMPLATES['chatml']
    first = "{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\n"
    first += re.sub(r"(['\\])", r'\\\1', system) + "<|im_end|>\n' }}{% endif %}"
    return TEMPLATES['chatml'].replace('{% for message in messages %}', '{% for message in messages %}' + first)


def markers_in(source):
    """What looks like a token in a template's source: '<|im_start|>' and the like."""
    return [*dict.fromkeys(re.findall(r'<\|[^|<>{}\s]{1,40}\|>', source))]


@functools.cache
def _environment():
    """Jinja in its sandbox, with what transformers gives to chat templates."""
    import jinja2.ext  # here, for most commands do without
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %} … {% endgeneration %}: what the assistant has to produce."""
        tags = {'generation'}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(['name:endgeneration'], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method('_marked'), [], [], body).set_lineno(line)

        def _marked(self, caller):
            return LEARN + caller() + LEARN_END

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters['tojson'] = tojson
    environment.globals['raise_exception'] = raise_exception
    return environment


def _reads(source):
    """The names of the variables that a template reads, and whether it has a {% generation %}."""
    from jinja2 import meta, nodes
    parsed = _environment().parse(source)
    return meta.find_undeclared_variables(parsed), any(
        node.name == '_marked' for node in parsed.find_all(nodes.ExtensionAttribute))


class NotNested(UserError):
    """The text up to an answer does not begin the text of the whole chat: the template renders earlier answers
    otherwise than they are generated, for example without their thoughts."""


class ChatTemplate:
    """A chat template and the tokens that its text is made of.

    source: the template, in Jinja. markers: the names of all added tokens, which a message's text must not become.
    special: those that only the template may write (default: all); an assistant may write the others, such as <think>.
    ends: the names of tokens that end a turn. names: the template's variables for tokens, {'bos_token': '<s>'}.
    date: what strftime_now tells, ISO 8601 (default: now).
    """

    def __init__(self, source, markers, ends=(), special=None, names=None, date=None):
        self.source, self.names = source, names or {}
        special = markers if special is None else special
        self.markers, self.special = (any_of(found) for found in (markers, special))
        self.date = datetime.datetime.fromisoformat(date) if date else datetime.datetime.now()
        try:
            self.template = _environment().from_string(source, globals={'strftime_now': self.date.strftime})
            self.variables, self.generation = _reads(source)
        except Exception as error:  # of syntax, in one of many classes
            raise UserError(f'its chat template is not one in Jinja: {one_line(error)}') from None
        self.end = self._end_of_turn()
        self.ends = any_of([*ends, *[self.end] * bool(self.end)])

    def _end_of_turn(self):
        """The first token after what the assistant says; None where there is none."""
        try:
            text = self._example()
        except UserError:
            return None
        found = self.markers.search(text, text.rfind('ANSWERED')) if 'ANSWERED' in text else None
        return found and found[0]

    def writes(self):
        """The tokens that the template itself puts around what is said."""
        return {*self.markers.findall(self._example())}

    def _example(self):
        """A chat of a question and its answer, as the template writes it."""
        turns = [{'role': 'user', 'content': 'ASKED'}, {'role': 'assistant', 'content': 'ANSWERED'}]
        return MARKS.sub('', self._render(turns, False, {}))

    def knows(self, name):
        """Whether the template reads a key of messages of this name."""
        return re.search(rf'\b{re.escape(name)}\b', self.source) is not None

    def _render(self, messages, generate, variables):
        try:
            return self.template.render(messages=messages, add_generation_prompt=generate, **self.names,
                                        **{'tools': None, 'documents': None} | variables)
        except Exception as error:  # a template can raise nearly anything
            raise UserError(f'the chat template refuses this chat: {one_line(error)}') from None

    def segments(self, messages, generate=False, calls=True):
        """A chat -> [(text, whether it counts in the loss)], in order; with generate nothing counts.

        messages: [{'role': …, 'content': …}], an assistant's also with 'tool_calls' and thoughts (THOUGHTS); one with
        'weight': 0 is not learned; the first may have 'variables', which the template reads: {'tools': […],
        'enable_thinking': False}. generate: end where the assistant's next message begins. calls: '[7]' in what the
        assistant says, '<tool>26 - 19</tool>[7]', the result of a call, is a text of its own and not learned, since
        generation puts it in (see `rollout.py`).

        With {% generation %}, what those blocks hold counts. Without it, each answer counts from the end of the prompt
        that it is generated from through the token that ends its turn. NotNested where the whole chat does not begin
        with that prompt and answer.
        """
        variables = _guarded(messages[0].get('variables', {}) if messages else {}, self.markers)
        for key in variables:
            if key not in self.variables or key in ('messages', 'add_generation_prompt', *self.names):
                raise UserError(f'the chat template knows no {key!r}: take it out of the rows, or give a template that '
                                'does (sft.py --chat_template=hermes or FILE.jinja)')
        messages = [self._prepared(number, message, calls) for number, message in enumerate(messages)]
        text = self._render(messages, generate, variables)
        if not generate:
            find = self._generation_spans if self.generation else self._answer_spans
            text, spans = find(messages, text, variables)
            for number, message in enumerate(messages):
                if message.get('weight') != 0 and message.get('thinking', '').strip() not in text:
                    raise UserError(f'message {number}: the chat template drops its thoughts: give them in its '
                                    '"content", or another template (sft.py --chat_template=FILE.jinja)')
            return _cut(text, spans)
        return _cut(re.sub(f'[{LEARN}{LEARN_END}{UNLEARNED}]', '', text), [])

    def _prepared(self, number, message, calls):
        """A message prepared for the template: markers guarded, results of calls marked, keys as the template reads
        them."""
        said = message['role'] == 'assistant'
        if message.get('tool_calls'):
            message = self._with_tool_calls(number, message)
        message = _guarded(message, self.special if said else self.markers)
        if message['role'] == 'developer' and not self.knows('developer'):
            message['role'] = 'system'
        thoughts = next((message[key] for key in THOUGHTS if message.get(key)), None) if said else None
        if thoughts:
            message |= {'thinking': thoughts, 'reasoning_content': thoughts}
        if thoughts and not self.knows('reasoning_content') and not self.knows('thinking'):
            message['content'] = f"<think>\n{thoughts}\n</think>\n\n{message.get('content') or ''}"
        if message.get('weight') == 0 and self.generation:
            message = _unlearned(message)
        for key in ('content', 'thinking', 'reasoning_content') if calls and said else ():
            if message.get(key):
                message[key] = ANSWERED_CALL.sub(rf'\1{RESULT}\3{RESULT_END}', message[key])
        return message

    @functools.cached_property
    def text_arguments(self):
        """Whether the template takes the arguments of a call as text, which it cannot write as an object."""
        def fits(arguments):
            call = {'id': 'CALL56789', 'type': 'function', 'function': {'name': 'f', 'arguments': arguments}}
            content = None if self.null_content else ''
            try:
                text = self._render([{'role': 'user', 'content': 'ASKED'},
                                     {'role': 'assistant', 'content': content, 'tool_calls': [call]}], False, {})
            except UserError:
                return False
            return "'x'" not in text  # as Python spells an object
        return not fits({'x': 1}) and fits('{"x": 1}')

    @property
    def null_content(self):
        """Whether the template asks if a message has no content."""
        return re.search(r'\bcontent\b\W*\sis\s+(not\s+)?none', self.source) is not None

    def _with_tool_calls(self, number, message):
        """Converts the arguments of each call to an object or to text, and missing content to None or '', whichever the
        template reads."""
        if not self.knows('tool_calls'):
            raise UserError(f'message {number} has tool_calls, which the chat template does not know: give one that '
                            'does (sft.py --chat_template=hermes or FILE.jinja)')
        content, found = message.get('content') or (None if self.null_content else ''), []
        for call in message['tool_calls']:
            function = dict(call.get('function', call))
            arguments = function.get('arguments')
            if not self.text_arguments and isinstance(arguments, str):
                try:
                    function['arguments'] = json.loads(arguments)
                except ValueError:
                    raise UserError(f'message {number}: the arguments of its call are not JSON: {arguments!r:.60}'
                                    ) from None
            elif self.text_arguments and not isinstance(arguments, str):
                function['arguments'] = json.dumps(arguments, ensure_ascii=False)
            found.append(call | {'function': function} if 'function' in call else function)
        return message | {'content': content, 'tool_calls': found}

    def _generation_spans(self, messages, text, _):
        """The text without LEARN and LEARN_END, and the spans that stood between them."""
        plain, spans = '', []
        for number, piece in enumerate(re.split(f'{LEARN}|{LEARN_END}', text)):
            learned, piece = number % 2 and UNLEARNED not in piece, piece.replace(UNLEARNED, '')
            if learned:
                spans.append((len(plain), len(plain) + len(piece)))
            plain += piece
        if spans and messages[-1].get('weight') != 0 and not self.ends.search(plain, *spans[-1]):
            raise UserError('the {% generation %} of the chat template holds no token that ends a turn: it would never '
                            'stop: put that before {% endgeneration %}')
        return plain, spans

    def _answer_spans(self, messages, text, variables):
        """The text, and the spans of what the assistant has to produce, found by rendering what comes before."""
        spans = []
        for i, message in enumerate(messages):
            if message['role'] != 'assistant' or message.get('weight') == 0:
                continue
            before = self._render(messages[:i], True, variables)
            until = text if i == len(messages) - 1 else self._render(messages[:i + 1], False, variables)
            if not until.startswith(before) or not text.startswith(until):
                raise NotNested(f'message {i}: the chat template renders this answer otherwise than it is generated, '
                                'as one does that drops thoughts: give a template that has {% generation %} (sft.py '
                                '--chat_template=FILE.jinja)')
            end = self.ends.search(until, len(before))  # where generation stops
            if end is None:
                raise UserError(f'message {i}: the chat template ends this answer with no token that ends a turn: it '
                                'would never stop')
            spans.append((len(before), end.end()))
        return text, spans


def any_of(names):
    """A regular expression for any of these names, the longest first, as a group; with no names it matches nothing."""
    return re.compile('(' + ('|'.join(map(re.escape, sorted(names, key=len, reverse=True))) or '(?!)') + ')')


def _unlearned(message):
    """A message with UNLEARNED in its content, or else in the names of its calls."""
    def marked(text):
        return re.sub(r'\S', lambda found: found[0] + UNLEARNED, text, count=1)
    if (message.get('content') or '').strip():
        return message | {'content': marked(message['content'])}
    calls = [call | {'function': call['function'] | {'name': marked(call['function']['name'])}} if 'function' in call
             else call | {'name': marked(call['name'])} for call in message.get('tool_calls') or []]
    return message | ({'tool_calls': calls} if calls else {})


def _guarded(value, markers):
    """A JSON value whose texts have GUARD in each marker; UserError for one with a mark of ours in it."""
    if isinstance(value, str):
        if not value.isascii() and (mark := MARKS.search(value)):
            raise UserError(f'a message has U+{ord(mark[0]):04X}, which is no character')
        return markers.sub(lambda found: found[0][0] + GUARD + found[0][1:], value)
    if isinstance(value, dict):
        return {_guarded(key, markers): _guarded(item, markers) for key, item in value.items()}
    return [_guarded(item, markers) for item in value] if isinstance(value, list) else value


def _cut(text, spans):
    """A text and the spans that are learned -> [(text, learned)], the results of calls apart and not learned."""
    at = sorted({0, len(text), *(place for span in spans for place in span),
                 *(found.start() for found in re.finditer(f'[{RESULT}{RESULT_END}]', text))})
    pieces, result, spans = [], False, iter(spans)
    span = next(spans, None)
    for begin, end in zip(at, at[1:], strict=False):
        piece = text[begin:end]
        if piece[0] in RESULT + RESULT_END:
            result, piece = piece[0] == RESULT, piece[1:]
        while span and span[1] <= begin:
            span = next(spans, None)
        if piece:
            pieces.append((piece, bool(span and span[0] <= begin) and not result))
    return pieces
