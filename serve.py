"""
Serve a model: OpenAI's API for programs, and a page to talk to it for people.

    python serve.py --init_from=out/sft                     a run, a Hugging Face directory, a .gguf file, smollm2 …
    python serve.py --init_from=smollm2 --port=8001 --max_rows=8
    python serve.py --init_from=out/sft --host=0.0.0.0 --api_key=SECRET            for other machines, too

    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "What is the capital of France?"}]}'

/v1/models, /v1/chat/completions and /v1/completions have the shapes of OpenAI's API, whole or streamed (SSE), so its
Python client works: OpenAI(base_url='http://127.0.0.1:8000/v1', api_key='none'). Beside its fields: top_k, min_p,
repetition_penalty, and chat_template_kwargs for the chat template. A field that would change the answer and is not
supported is refused. <think>…</think> comes as "reasoning_content", and where "tools" are given,
<tool_call>{"name": …, "arguments": …}</tool_call> as "tool_calls".

Requests are continued side by side: one thread owns the model (`Engine`), and before each step of all rows, new ones
join and those that are done leave (iteration-level scheduling: Orca, OSDI 2022, Yu et al.). A long prompt is read in
parts, between which the others advance (chunked prefill, arXiv:2308.16369).
"""
import asyncio
import base64
import hashlib
import hmac
import json
import math
import os
import re
import socket
import threading
import time
import traceback
import uuid
from collections import deque
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import runtime

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route

from chat import read_call
from generate import Batch, Row, check_prompts, penalise, sample, uniforms
from load import load_to_generate
from model import GPTConfig
from rollout import forcing
from rows import read_request
from tokenizer import UserError

# what and where
init_from = 'out/sft'  # a run's directory or checkpoint, a Hugging Face directory, a .gguf file, smollm2, gpt2 …
model_name = ''  # what the API calls the model; empty: init_from
host = '127.0.0.1'  # of this machine alone; another address, such as 0.0.0.0, needs api_key
port = 8000  # 0 = any that is free
system = ''  # what the system says first in chats that say nothing of it; FILE:PATH reads it from there
api_key = ''  # what clients must send: Authorization: Bearer KEY; FILE:PATH keeps it out of the process list
# how answers are made
max_rows = 16  # answers that are continued side by side
prefix_cache_tokens = 8192  # of ended answers, whose keys and values are kept for the next turn of a chat; 0 = off
max_queue = 64  # answers that may wait for their turn; more are refused with status 429
tools = False  # the calculator answers <tool>…</tool>; functions are left to clients
max_think_tokens = 0  # tokens after which <think> is closed; 0 = whenever it likes
num_waits = 0  # the first so many times that the model would close <think>, `wait` comes instead
wait = 'Wait'  # num_waits: what a thought goes on with
# machine
device = 'auto'  # 'cpu', 'cuda', 'mps'; auto = the best there is
dtype = 'auto'  # 'float32', 'bfloat16' or 'float16'; auto = 16 bits where the device is faster so
quant = 'auto'  # on a CPU: weights in 16 bits ('fp16') or 8 ('int8'); '' = as in dtype, auto = as is fast and exact

PART = 256  # tokens of prompts that are read between two steps of the other rows
ROOM = 256  # new tokens that a cache has memory for at first
MAX_BODY = 8 << 20  # bytes of a request
GRACE = 1.5  # seconds that Ctrl-C leaves to running answers

# ----------------------------------------------------------------------------------------------------------------------
# what a client may ask for


class Refused(Exception):
    """An error in OpenAI's shape."""

    def __init__(self, message, status=400, param=None, code=None):
        super().__init__(message)
        kind = {401: 'authentication_error', 429: 'rate_limit_error'}.get(status, 'invalid_request_error')
        self.status = status
        self.body = {'error': {'message': message, 'type': 'server_error' if status >= 500 else kind, 'param': param,
                               'code': code}}


class Number(NamedTuple):
    """A field that is a number from low to high; whole: an integer."""
    low: float
    high: float
    default: float
    whole: bool = False


WHOLE, MAX_STOPS, MAX_TOP = 1 << 53, 16, 20
SAMPLING = {'temperature': Number(0, 2, 1.0), 'top_k': Number(0, WHOLE, 0, True), 'top_p': Number(0, 1, 1.0),
            'min_p': Number(0, 1, 0.0), 'repetition_penalty': Number(1e-3, 1e3, 1.0)}
PENALTIES = {'presence_penalty': Number(-2, 2, 0.0), 'frequency_penalty': Number(-2, 2, 0.0)}
OTHERS = {'n': Number(1, WHOLE, 1, True), 'max_tokens': Number(1, WHOLE, None, True),
          'max_completion_tokens': Number(1, WHOLE, None, True),
          'seed': Number(1 - (1 << 63), (1 << 63) - 1, None, True),
          'top_logprobs': Number(0, MAX_TOP, 0, True)}
NUMBERS = {**SAMPLING, **PENALTIES, **OTHERS}
# fields with the only values that are supported; fields that change no answer
ONLY = {'response_format': ({'type': 'text'},), 'modalities': (['text'],), 'tool_choice': ('auto', 'none'),
        'echo': (False,), 'suffix': ('',), 'best_of': (1,), 'functions': ([],), 'function_call': ('auto', 'none'),
        'parallel_tool_calls': (True,), 'store': (False,)}
IGNORED = {'user', 'metadata', 'service_tier', 'safety_identifier', 'prompt_cache_key', 'stream_options', 'stream',
           'model'}
OWN = {'chat': {'messages', 'tools', 'chat_template_kwargs', 'logprobs', 'stop', 'logit_bias'},
       'text': {'prompt', 'logprobs', 'stop', 'logit_bias'}}


class Options(NamedTuple):
    """How the answers to a prompt are drawn."""
    sampling: tuple  # the values of SAMPLING
    penalties: tuple  # of PENALTIES
    stop: tuple  # texts that end an answer
    bias: dict  # {id: what is added to its logit}
    top: int | None  # how many of the likeliest tokens are told beside each; None: no log-probabilities


def number(body, name, kind=None):
    """The value of a field that is a Number, of NUMBERS if not of another kind."""
    value, kind = body.get(name), kind or NUMBERS[name]
    if value is None:
        return kind.default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or kind.whole and value != value // 1:
        raise Refused(f'{name!r} must be a {"whole " * kind.whole}number, not {value!r:.40}', param=name)
    if not kind.low <= value <= kind.high:
        raise Refused(f'{name!r} must be from {kind.low:g} to {kind.high:g}, not {value!r:.40}', param=name)
    return int(value) if kind.whole else float(value)


def truth(body, name):
    value = body.get(name)
    if not isinstance(value, bool | None):
        raise Refused(f'{name!r} must be true or false, not {value!r:.40}', param=name)
    return bool(value)


def check_fields(body, shape):
    """Refused for a field that is unknown, or not supported and given a value that would change the answer."""
    known = {*ONLY, *NUMBERS, *IGNORED, *OWN[shape]} - ({'top_logprobs'} if shape == 'text' else set())
    for name, value in body.items():
        idle = name == 'parallel_tool_calls' and not body.get('tools')
        if name in ONLY and value is not None and value not in ONLY[name] and not idle:
            raise Refused(f'{name!r} is not supported: leave it out', param=name)
        if name not in known and value is not None:
            raise Refused(f'unknown field {name!r:.60}', param=name)
    usage = body.get('stream_options')
    if not (usage is None or isinstance(usage, dict)):
        raise Refused("'stream_options' must be an object", param='stream_options')


def read_options(body, shape, n_vocab, own=None):
    """The Options of a request's body; own: what the model has of SAMPLING, where the request says nothing."""
    stop = body.get('stop')
    stop = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stop, list) or len(stop) > MAX_STOPS or not all(isinstance(s, str) and s for s in stop):
        raise Refused(f"'stop' must be a text or a list of at most {MAX_STOPS} texts, none empty", param='stop')
    bias = body.get('logit_bias') or {}
    if not isinstance(bias, dict) or not all(
            re.fullmatch('[0-9]{1,9}', key) and int(key) < n_vocab and type(value) in (int, float) and
            -100 <= value <= 100 for key, value in bias.items()):
        raise Refused("'logit_bias' must map ids of tokens to numbers from -100 to 100", param='logit_bias')
    if shape == 'chat':
        top = number(body, 'top_logprobs') if truth(body, 'logprobs') else None
        if top is None and body.get('top_logprobs'):
            raise Refused("'top_logprobs' needs 'logprobs': true", param='top_logprobs')
    else:
        top = number(body, 'logprobs', Number(0, MAX_TOP, None, True))
    asked = (own or {}) | {name: value for name, value in body.items() if value is not None}
    sampling = {name: number(asked, name) for name in SAMPLING}
    sampling['top_p'] = max(sampling['top_p'], 1e-9)  # of 0: the likeliest alone
    return Options(tuple(sampling.values()),
                   tuple(number(body, name) for name in PENALTIES), tuple(stop),
                   {int(key): value for key, value in bias.items()}, top)


def read_prompts(body, tokenizer):
    """The 'prompt' of a request for a text: a text, ids, or a list of either -> lists of ids."""
    prompt = body.get('prompt')
    if isinstance(prompt, str) or isinstance(prompt, list) and prompt and all(type(i) is int for i in prompt):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt or not all(
            isinstance(p, str) or isinstance(p, list) and p and all(type(i) is int for i in p) for p in prompt):
        raise Refused("'prompt' must be a text, a list of ids, or a list of these, none empty", param='prompt')
    start = [] if tokenizer.bos is None else [tokenizer.bos]
    # of no text at all: what may follow the end of another
    return [p if isinstance(p, list) else [*start, *tokenizer.encode(p)] or [tokenizer.eot] for p in prompt]


# ----------------------------------------------------------------------------------------------------------------------
# the text of an answer


class Part(NamedTuple):
    """Some of an answer's text. kind: 'content', 'reasoning_content', or 'call', whose text is {'name', 'arguments'}.
    """
    kind: str
    text: object


class Text:
    """The text of an answer as its tokens come: thoughts, calls of tools and the rest apart, up to a stop text.

    What may be the beginning of a stop text or of a marker is held back until that is decided. thinking: whether the
    prompt ends within a thought.
    """

    def __init__(self, tokenizer, stop=(), chat=False, calls=False, thinking=False):
        self.decoder, self.stop, self.calls = tokenizer.stream(start=chat), stop, calls
        self.unsaid = {*tokenizer.special.values()}  # which a client could not tell from text
        self.kind, self.held = 'reasoning_content' if thinking else 'content', ''
        self.may_think = chat and not thinking  # a thought comes first or not at all
        self.skip_newlines = thinking  # which templates put around thoughts and calls
        self.stopped = self.called = False

    def push(self, token):
        """The Parts that are complete with one more token."""
        return [] if token in self.unsaid else self.feed(self.decoder.push(token))

    def end(self):
        """The Parts that are left."""
        parts, left = self.feed(self.decoder.flush()), self.held
        if self.kind == 'call':
            self.kind, left = 'content', f'<tool_call>{left}'
        self.held = ''
        return parts + self.say(left)

    def markers(self):
        """What changes the kind of the text after it -> that kind."""
        if self.kind == 'reasoning_content':
            return {'</think>': 'content'}
        if self.kind == 'call':
            return {'</tool_call>': 'content'}
        return {marker: kind for marker, kind, may in (('<think>', 'reasoning_content', self.may_think),
                                                       ('<tool_call>', 'call', self.calls)) if may}

    def feed(self, text):
        self.held += '' if self.stopped else text
        parts = []
        while not self.stopped:
            markers = self.markers()
            words = [*markers] if self.kind == 'call' else [*self.stop, *markers]
            found = re.search('|'.join(map(re.escape, words)), self.held) if words else None
            if found is None:
                cut = 0 if self.kind == 'call' else len(self.held) - held_back(self.held, words)
                before, self.held = self.held[:cut], self.held[cut:]
                return parts + self.say(before)
            before, self.held = self.held[:found.start()], self.held[found.end():]
            if found[0] == '<think>' and before.strip():  # no thought but text, as what comes before it shows
                self.may_think, self.held = False, before + found[0] + self.held
                continue
            parts += self.call(before) if self.kind == 'call' else self.say(before)
            if found[0] in self.stop:
                self.stopped, self.held = True, ''
            else:
                self.kind, self.skip_newlines = markers[found[0]], True
        return parts

    def say(self, text):
        """A text of the kind that it is now -> its Parts."""
        if self.skip_newlines:
            text = text.lstrip('\n')
        if not text:
            return []
        self.skip_newlines = False
        self.may_think &= not text.strip()
        return [Part(self.kind, text)]

    def call(self, text):
        """What stood in <tool_call>…</tool_call> -> its Parts: a call, or the text itself where it is none."""
        try:
            name, arguments = read_call(text)
            if not isinstance(arguments, str):
                arguments = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        except (ValueError, RecursionError):
            return [Part('content', f'<tool_call>{text}</tool_call>')]
        self.called = True
        return [Part('call', {'name': name, 'arguments': arguments})]


def held_back(text, words):
    """How many characters at the end of text may be the beginning of one of some words."""
    longest = max(map(len, words), default=1) - 1
    return next((n for n in range(min(longest, len(text)), 0, -1) if any(w.startswith(text[-n:]) for w in words)), 0)


# ----------------------------------------------------------------------------------------------------------------------
# the thread that owns the model


class Delta(NamedTuple):
    """What has come of an answer since the last Delta of it."""
    index: int  # which of the answers to a request it is
    parts: list  # Parts
    tokens: list  # (id, log-probability, [(id, log-probability) of the likeliest]), where these are asked for
    finish: str | None  # why it ended: 'stop', 'length', 'tool_calls'
    length: int  # tokens of the answer so far


@dataclass(eq=False)
class Request:
    """A prompt that is waiting for n answers."""
    ids: list
    n: int
    max_new_tokens: int
    options: Options
    uniforms: list  # of each answer
    text: object  # makes the Text of an answer
    put: object  # takes each Delta, or the Refused that ends it all
    first: int = 0  # the index of its first answer
    cached: int = 0  # tokens of the prompt that were known
    cancelled: bool = False


@dataclass
class Answer(Row):
    """A row of the batch."""
    request: Request = None
    index: int = 0
    text: Text = None
    logprobs: list = field(default_factory=list)  # of tokens that `Batch.append` has not given out yet
    tokens: list = field(default_factory=list)  # of the next Delta
    broken: bool = False  # its keys and values may be no numbers


class Engine:
    """One thread that continues all answers side by side; the rest of the program hands it Requests."""

    def __init__(self, model, tokenizer, rows=16, queue=64, prefix_cache_tokens=8192, force=None):
        self.model, self.tokenizer, self.force = model, tokenizer, force
        self.max_rows, self.max_queue, self.prefix_cache_tokens = rows, queue, prefix_cache_tokens
        self.stop_ids = set(tokenizer.turn_ids)
        self.batch = Batch(model, room=ROOM)
        self.reading = None  # (a generator that reads prompts part by part, their Answers)
        self.taken = []  # requests whose rows are being made
        self.kept = []  # (ids, the cache that holds them) of answers that have ended, the last used last
        self.waiting, self.changed = deque(), threading.Condition()
        self.news, self.loop = [], None  # what the event loop is to be told
        self.closing = False
        self.thread = threading.Thread(target=self.run, daemon=True)

    # called by the event loop's thread

    def submit(self, requests):
        """Queues requests, all or none; Refused where there is no room."""
        with self.changed:
            if self.closing:
                raise Refused('the server is stopping', 503)
            if len(self.waiting) + len(requests) > self.max_queue:
                raise Refused(f'{len(self.waiting)} requests are waiting already: try again later', 429,
                              code='rate_limit_exceeded')
            self.waiting += requests
            self.changed.notify()

    def cancel(self, requests):
        """Forgets requests whose client has gone; their rows leave before the next step."""
        with self.changed:
            for request in requests:
                request.cancelled = True
            self.waiting = deque(request for request in self.waiting if not request.cancelled)

    def close(self):
        """Ends everything that is under way."""
        with self.changed:
            self.closing = True
            self.changed.notify()

    @property
    def active(self):
        """How many answers are under way."""
        return len(self.rows())

    def rows(self):
        """Those whose prompts are being read, too."""
        joining, reading = self.batch.waiting, self.reading
        return self.batch.rows + (joining[0] if joining else []) + (reading[1] if reading else [])

    # the thread

    def run(self):
        while not self.closing:
            with self.changed:
                while not (self.waiting or self.active or self.closing):
                    self.changed.wait()
            try:
                self.read_prompts()
                self.step()
            except Exception as error:  # whatever it is, the next request is not to suffer from it
                if not isinstance(error, UserError):
                    traceback.print_exc()
                self.fail(Refused(f'the model failed: {error}'.split('\n')[0], 500))
            self.tell()
        if self.active:
            print(f'answers that were cut off: {self.active}', flush=True)
        self.fail(Refused('the server is stopping', 503))
        self.tell()

    def read_prompts(self):
        """Reads about PART tokens of the next prompts for which there are rows, perhaps in the midst of one."""
        room = PART
        while room > 0:
            if self.reading is None:
                rows, shared, cache = self.next_rows()
                if not rows:
                    return
                self.reading, self.taken = (self.batch.admit_in_parts(rows, shared, PART, cache), rows), []
            parts, rows = self.reading
            left = max(len(row.ids) - row.request.cached for row in rows) * len({id(row.request) for row in rows})
            if all(row.request.cancelled for row in rows) or next(parts, 'read') == 'read':
                self.reading = None  # they are in the batch, or nobody waits for them
            room -= left
        if self.reading:  # a long prompt does not keep short ones waiting
            rows, shared, cache = self.next_rows(most=PART)
            if rows:
                self.batch.admit(rows, shared, cache)
                self.taken = []

    def next_rows(self, most=math.inf):
        """Rows for the requests whose turn it is, how many neighbours share a prompt, and a cache that holds the
        beginning of the prompt, or None: those of the next request, or, if each wants one answer to an unknown prompt,
        of as many as take one part together. most: pass over those with longer prompts."""
        with self.changed:
            free, taken, source = self.max_rows - self.active, [], None
            for request in [request for request in self.waiting if len(request.ids) <= most]:
                if request.n > free:
                    break
                request.cached, source = self.known(request.ids)
                longest = max(len(r.ids) for r in [*taken, request])
                alone = request.n > 1 or request.cached
                if taken and (alone or (len(taken) + 1) * longest > PART):
                    break
                taken.append(request)
                self.waiting.remove(request)
                free -= request.n
                if alone:
                    break
            self.taken = taken  # what fails from here on is told to them, too
        rows = [Answer(request.ids, request.max_new_tokens, request.uniforms[i], request=request, force=self.force,
                       index=request.first + i, text=request.text()) for request in taken for i in range(request.n)]
        cached = taken[0].cached if taken else 0
        return rows, taken[0].n if taken else 1, source.part(0, cached) if cached else None

    def known(self, ids):
        """How many of a prompt's first ids are in a cache that was kept, and that cache: of a chat, all but what its
        last turn has brought."""
        best, found = 0, None
        for at, (known, _) in enumerate(self.kept):
            same = next((i for i, (a, b) in enumerate(zip(ids[:-1], known, strict=False)) if a != b),
                        min(len(ids) - 1, len(known)))
            if same > best and (same == len(known) or not self.batch.model.config.n_delta):  # states have no parts
                best, found = same, at
        if best < 64:  # reading these takes no time, together with others
            return 0, None
        self.kept.append(self.kept.pop(found))
        return best, self.kept[-1][1]

    def keep(self, number, row):
        """Keeps what the cache holds of a row that has ended, in place of what was kept of its beginning."""
        length = self.batch.cache.lengths[number] if self.batch.cache else 0
        ids = row.ids[:length]
        if row.start or row.broken or not 0 < length <= self.prefix_cache_tokens:
            return
        self.kept = [(known, cache) for known, cache in self.kept if known != ids[:len(known)]]
        self.kept.append((ids, self.batch.cache.part(number, length)))
        while sum(len(known) for known, _ in self.kept) > self.prefix_cache_tokens:
            self.kept.pop(0)

    @torch.inference_mode()
    def step(self):
        """The next token of every row."""
        batch = self.batch
        for row in batch.rows:
            row.done |= row.request.cancelled
        self.retire()
        if not batch.rows and batch.waiting is None:
            return
        logits = batch.advance()
        for i in (~logits.amax(-1).isfinite()).nonzero()[:, 0].tolist():  # one text of many may overflow 16 bits
            row, logits[i] = batch.rows[i], 0
            row.done = row.broken = row.request.cancelled = True
            self.news.append((row.request, Refused('the logits of the next token are not finite', 500)))
        ids = [row.forced[0] if row.forced else token for row, token in zip(batch.rows, self.draw(logits), strict=True)]
        for number, (row, token) in enumerate(zip(batch.rows, ids, strict=True)):
            row.number = number
            row.logprobs.append(self.logprobs(row, logits[number], token))
        numbers, known, _ = batch.append(ids, [0.0] * len(ids), self.stop_ids)
        for row, token in zip([batch.rows[number] for number in numbers], known, strict=True):
            logprobs = row.logprobs.pop(0)
            if not row.text.stopped:
                self.take(row, token, logprobs)
        for row in batch.rows:
            del row.logprobs[len(row.held):]  # of what was taken back
        self.retire()

    def retire(self):
        for number, row in enumerate(self.batch.rows):
            if row.done:
                self.keep(number, row)
        self.batch.retire()

    def draw(self, logits):
        """A token for every row, drawn as its request wants it; for those that want the same in one go."""
        rows, alike, ids = self.batch.rows, {}, [0] * len(logits)
        for i, row in enumerate(rows):
            alike.setdefault((row.request.options.sampling, row.request.options.penalties), []).append(i)
        for (sampling, penalties), which in alike.items():
            mine, wanted = [rows[i] for i in which], logits[which]  # a copy
            if any(penalties):
                wanted = penalise(wanted, [row.answer for row in mine], *penalties)
            for row, line in zip(mine, wanted, strict=True):
                for token, value in row.request.options.bias.items():
                    line[token] += value
            u = torch.tensor([row.u for row in mine], device=logits.device)
            options = dict(zip(SAMPLING, sampling, strict=True))
            drawn, _ = sample(wanted, [row.ids for row in mine], u, self.tokenizer.n_vocab, **options)
            for i, token in zip(which, drawn, strict=True):
                ids[i] = token
        return ids

    def logprobs(self, row, logits, token):
        """(The log-probability of a row's next token, [(id, log-probability) of the likeliest]) as the model has them,
        before any option of sampling; None where the request did not ask."""
        top = row.request.options.top
        if top is None:
            return None
        logprobs = logits[:self.tokenizer.n_vocab].log_softmax(-1)
        best = logprobs.topk(min(top, len(logprobs)))
        return logprobs[token].item(), [*zip(best.indices.tolist(), best.values.tolist(), strict=True)]

    def take(self, row, token, logprobs):
        """Tells what a row's new token adds to its text."""
        ended = token in self.stop_ids
        if logprobs is not None and not ended:
            row.tokens.append((token, *logprobs))
        parts, finish = [] if ended else row.text.push(token), None
        if row.done and not row.logprobs or row.text.stopped:
            parts, row.done = parts + row.text.end(), True
            finish = 'tool_calls' if ended and row.text.called else 'stop' if ended or row.text.stopped else 'length'
        if parts or finish:
            self.news.append((row.request, Delta(row.index, parts, row.tokens, finish, len(row.answer))))
            row.tokens = []

    def fail(self, why):
        """Ends every answer that is under way, and where the server stops those that wait."""
        with self.changed:
            requests = [row.request for row in self.rows()] + self.taken
            if self.closing:
                requests += self.waiting
                self.waiting.clear()
        self.news += [(request, why) for request in requests]
        self.batch, self.reading, self.kept, self.taken = Batch(self.model, room=ROOM), None, [], []

    def tell(self):
        """Hands the event loop all that is new, in one call."""
        news, self.news = self.news, []
        if news and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(lambda: [request.put(item) for request, item in news])


# ----------------------------------------------------------------------------------------------------------------------
# OpenAI's shapes


class Reply:
    """What a client is told of a request with some prompts: its id, and the shape of what comes."""

    def __init__(self, shape, name, tokenizer, requests):
        self.chat, self.name, self.tokenizer, self.requests = shape == 'chat', name, tokenizer, requests
        self.id = ('chatcmpl-' if self.chat else 'cmpl-') + uuid.uuid4().hex
        self.created, self.lengths, self.calls, self.decoders = int(time.time()), {}, {}, {}

    def around(self, choices, streamed, **more):
        kind = ('chat.completion' if self.chat else 'text_completion') + '.chunk' * (streamed and self.chat)
        return {'id': self.id, 'object': kind, 'created': self.created, 'model': self.name, 'choices': choices} | more

    def usage(self):
        said = sum(self.lengths.values())
        read = sum(len(request.ids) for request in self.requests)
        cached = sum(request.cached for request in self.requests)
        return {'prompt_tokens': read, 'completion_tokens': said, 'total_tokens': read + said,
                'prompt_tokens_details': {'cached_tokens': cached}}

    def choice(self, delta, streamed=True):
        """A Delta, or all of an answer as one, in its shape."""
        self.lengths[delta.index] = delta.length
        texts = {kind: ''.join(part.text for part in delta.parts if part.kind == kind)
                 for kind in ('content', 'reasoning_content')}
        found = {'index': delta.index, 'finish_reason': delta.finish, 'logprobs': None}
        if not self.chat:
            return found | {'text': texts['content'], 'logprobs': self.text_logprobs(delta)}
        calls = []
        for part in delta.parts:
            if part.kind == 'call':
                number = self.calls[delta.index] = self.calls.get(delta.index, -1) + 1
                calls.append({'id': f'call_{uuid.uuid4().hex[:24]}', 'type': 'function', 'function': part.text}
                             | ({'index': number} if streamed else {}))
        message = {kind: text for kind, text in texts.items() if text} | ({'tool_calls': calls} if calls else {})
        if delta.tokens or not streamed and self.requests[0].options.top is not None:
            found['logprobs'] = {'content': [
                self.token(i, logprob) | {'top_logprobs': [self.token(*other) for other in top]}
                for i, logprob, top in delta.tokens], 'refusal': None}
        if streamed:
            return found | {'delta': message}
        message = {'role': 'assistant', 'content': texts['content'] or ('' if not calls else None)} | message
        return found | {'message': message | {'refusal': None}}

    def token(self, i, logprob):
        """A token and its log-probability in chats' shape."""
        return {'token': self.tokenizer.decode([i], start=False), 'logprob': max(logprob, -9999.0),
                'bytes': list(self.tokenizer.decode_bytes([i]))}

    def text_logprobs(self, delta):
        """The same in texts' shape."""
        if not delta.tokens:
            return None
        decoder, length = self.decoders.setdefault(delta.index, (self.tokenizer.stream(start=False), 0))
        spelled, offsets, silent = [], [], {*self.tokenizer.special.values()}
        for i, *_ in delta.tokens:
            spelled.append(self.tokenizer.decode([i], start=False))
            offsets.append(length)
            length += 0 if i in silent else len(decoder.push(i))
        self.decoders[delta.index] = decoder, length
        return {'tokens': spelled, 'token_logprobs': [max(logprob, -9999.0) for _, logprob, _ in delta.tokens],
                'top_logprobs': [{self.tokenizer.decode([i], start=False): max(value, -9999.0)
                                  for i, value in reversed(top)} for *_, top in delta.tokens], 'text_offset': offsets}


def merged(deltas):
    """The Deltas of one answer -> one."""
    parts = []
    for part in (part for delta in deltas for part in delta.parts):
        if parts and part.kind == parts[-1].kind != 'call':
            parts[-1] = Part(part.kind, parts[-1].text + part.text)
        else:
            parts.append(part)
    return deltas[-1]._replace(parts=parts, tokens=[token for delta in deltas for token in delta.tokens])


# ----------------------------------------------------------------------------------------------------------------------
# HTTP


async def read_json(request):
    """The object that a request's body holds."""
    data = bytearray()
    try:
        async with asyncio.timeout(30):
            async for chunk in request.stream():
                data += chunk
                if len(data) > MAX_BODY:
                    raise Refused(f'the body has more than {MAX_BODY:,} bytes', 413)
    except TimeoutError:
        raise Refused('the body took more than 30 s to come', 408) from None
    try:
        body = json.loads(data, parse_constant=lambda name: 1 / 0)
    except (ValueError, RecursionError, ZeroDivisionError) as error:
        raise Refused(f'the body is not JSON: {error}') from None
    if not isinstance(body, dict):
        raise Refused('the body must be a JSON object')
    return body


class Server:
    """The endpoints around an Engine."""

    def __init__(self, engine, name, secret='', system=''):
        self.engine, self.name, self.secret, self.began = engine, name, secret, int(time.time())
        self.system = system
        self.tokenizer, self.config = engine.tokenizer, engine.model.config
        try:
            self.chats = bool(self.tokenizer.chat)
        except UserError as error:
            self.chats, self.no_chats = False, f'{error}'
        self.longest = int(self.tokenizer.token_bytes().max()) * self.config.block_size  # bytes of a context

    def allow(self, request):
        """Refused for a request without the key, and for one that another site's page sends from a browser."""
        scheme, _, given = request.headers.get('authorization', '').partition(' ')
        if self.secret and not (scheme.lower() == 'bearer' and
                                hmac.compare_digest(given.encode('latin-1'), self.secret.encode())):
            raise Refused('wrong or no API key: send the header Authorization: Bearer KEY', 401, code='invalid_api_key')
        origin, address = request.headers.get('origin'), request.headers.get('host', '')
        if origin and origin.partition('://')[2] != address:
            raise Refused(f'a page of {origin:.100} may not use this server, which was asked for as {address:.100}: a '
                          'proxy must pass on the header Host', 403)
        if not self.secret and re.sub(r':\d+$', '', address) not in ('127.0.0.1', 'localhost', '[::1]'):
            # nor one whose name has come to lead to this machine
            raise Refused(f'{address:.100} is not this machine: start the server with --api_key=SECRET', 403)

    async def models(self, request):
        self.allow(request)
        known = {'id': self.name, 'object': 'model', 'created': self.began, 'owned_by': 'flatgpt',
                 'parameters': self.engine.model.num_params(), 'context': self.config.block_size, 'chat': self.chats}
        name = request.path_params.get('name')
        if name not in (None, self.name):
            raise no_model(name, self.name)
        return answer(known if name else {'object': 'list', 'data': [known]})

    async def health(self, request):
        engine = self.engine
        return answer({'status': 'stopping' if engine.closing else 'ok', 'rows': engine.active,
                       'waiting': len(engine.waiting)})

    async def complete(self, request, shape):
        """The answers to a request, whole or as they come."""
        self.allow(request)
        body = await read_json(request)
        check_fields(body, shape)
        if body.get('model') not in (None, self.name):
            raise no_model(body['model'], self.name)
        streamed, news = truth(body, 'stream'), asyncio.Queue()
        # in a thread of its own: a long text takes a while
        requests = await asyncio.to_thread(self.requests, body, shape, news.put_nowait)
        reply = Reply(shape, self.name, self.tokenizer, requests)
        self.engine.submit(requests)
        if streamed:
            usage = (body.get('stream_options') or {}).get('include_usage')
            return EventStream(self.events(requests, news, reply, usage), lambda: self.engine.cancel(requests))
        return await self.whole(request, requests, news, reply)

    def requests(self, body, shape, put):
        """The Requests of a body, one for each prompt; Refused for one that the model cannot have."""
        own = self.tokenizer.sampling if shape == 'chat' else {}
        options, n = read_options(body, shape, self.tokenizer.n_vocab, own), number(body, 'n')
        calls, thinking, block = False, False, self.config.block_size
        said = body.get('messages' if shape == 'chat' else 'prompt')
        for text in said if isinstance(said, list) else [said]:
            text = text.get('content') if isinstance(text, dict) else text
            if isinstance(text, str) and len(text) > self.longest:  # tokenising it would take long
                raise too_long(f'more than {len(text):,} characters', block, shape)
        try:
            if shape == 'chat':
                if not self.chats:
                    raise Refused(f'{self.no_chats}; /v1/completions continues texts')
                hidden = {'tools'} if body.get('tool_choice') == 'none' else set()
                asked = {'messages', 'tools', 'chat_template_kwargs'} - hidden
                messages = read_request({key: body.get(key) for key in asked})
                if self.system and not any(m['role'] in ('system', 'developer') for m in messages):
                    variables = messages[0].pop('variables', {})  # which stand in the first message
                    messages = [{'role': 'system', 'content': self.system, 'variables': variables}, *messages]
                calls = 'tools' in messages[0].get('variables', {})
                ids, _ = self.tokenizer.chat_ids(messages, generate=True)
                prompts, thinking = [ids], self.tokenizer.decode(ids[-16:]).rstrip().endswith('<think>')
            else:
                prompts = read_prompts(body, self.tokenizer)
            check_prompts(prompts, self.config)
        except (ValueError, RecursionError) as error:  # a UserError is one
            raise Refused(f'{error}', param='messages' if shape == 'chat' else 'prompt') from None
        if n > self.engine.max_rows or n * len(prompts) > self.engine.max_queue:
            raise Refused(f'{n} answers to {len(prompts)} prompts are more than this server takes at once', param='n')
        longest = max(map(len, prompts))
        if longest >= block:
            raise too_long(f'{longest} tokens', block, shape)
        most = number(body, 'max_completion_tokens')
        most = most or number(body, 'max_tokens') or (block if shape == 'chat' else 16)
        steps = [min(most, block - len(ids)) for ids in prompts]
        draws = uniforms(number(body, 'seed'), len(prompts), n, max(steps))

        def text():
            return Text(self.tokenizer, options.stop, shape == 'chat', calls, thinking)
        return [Request(ids, n, steps[i], options, draws[i * n:i * n + n], text, put, first=i * n)
                for i, ids in enumerate(prompts)]

    async def events(self, requests, news, reply, usage):
        """The lines of a stream."""
        left, begun = sum(request.n for request in requests), set()
        while left:
            try:
                delta = await asyncio.wait_for(news.get(), 15)
            except TimeoutError:
                yield ': waiting\n\n'  # or a proxy would close the connection
                continue
            if isinstance(delta, Refused):
                yield f'data: {json.dumps(delta.body)}\n\n'
                return
            choice = reply.choice(delta)
            if reply.chat and delta.index not in begun:
                begun.add(delta.index)
                choice['delta'] = {'role': 'assistant', 'content': ''} | choice['delta']
            left -= delta.finish is not None
            yield f'data: {json.dumps(reply.around([choice], True))}\n\n'
        if usage:
            yield f'data: {json.dumps(reply.around([], True, usage=reply.usage()))}\n\n'
        yield 'data: [DONE]\n\n'

    async def whole(self, request, requests, news, reply):
        """The one answer with everything, or nothing, if the client goes away before."""
        async def gone():
            while (await request.receive())['type'] != 'http.disconnect':
                pass

        async def collect():
            deltas, left = {}, sum(request.n for request in requests)
            while left:
                delta = await news.get()
                if isinstance(delta, Refused):
                    raise delta
                deltas.setdefault(delta.index, []).append(delta)
                left -= delta.finish is not None
            choices = [reply.choice(merged(deltas[i]), streamed=False) for i in sorted(deltas)]
            return answer(reply.around(choices, False, usage=reply.usage()))

        tasks = [asyncio.ensure_future(task) for task in (collect(), gone())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return tasks[0].result() if tasks[0].done() else answer({}, 499)
        finally:
            self.engine.cancel(requests)
            for task in tasks:
                task.cancel()

    async def page(self, request):
        page = (Path(__file__).parent / 'serve.html').read_bytes()
        own = []  # no other code can run in it, whatever a model says
        for tag in ('script', 'style'):
            text = re.search(rf'<{tag}>(.*?)</{tag}>'.encode(), page, re.S)[1]
            own.append(f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'")
        policy = (f"default-src 'none'; {'; '.join(own)}; connect-src 'self'; img-src data:; base-uri 'none'; "
                  "form-action 'none'; frame-ancestors 'none'")
        return HTMLResponse(page, headers={'content-security-policy': policy})

    async def refuse(self, request, error):
        """An exception -> OpenAI's error object."""
        if isinstance(error, HTTPException):
            error = Refused(f'{request.method} {request.url.path:.100}: {error.detail}; see /v1/models, '
                            '/v1/chat/completions, /v1/completions', error.status_code)
        elif isinstance(error, ClientDisconnect):
            error = Refused('the client has gone', 499)
        elif not isinstance(error, Refused):
            error = Refused(f'{type(error).__name__} in the server', 500)
        return answer(error.body, error.status, {'retry-after': '1'} if error.status in (429, 503) else None)

    def app(self):
        @asynccontextmanager
        async def lifespan(_):
            self.engine.loop = asyncio.get_running_loop()
            self.engine.thread.start()
            yield
            self.engine.close()

        routes = [Route('/', self.page), Route('/health', self.health), Route('/v1/models', self.models),
                  Route('/v1/models/{name:path}', self.models),
                  Route('/v1/chat/completions', partial(self.complete, shape='chat'), methods=['POST']),
                  Route('/v1/completions', partial(self.complete, shape='text'), methods=['POST'])]
        return Starlette(routes=routes, lifespan=lifespan, exception_handlers=dict.fromkeys(
            (Refused, HTTPException, ClientDisconnect, Exception), self.refuse))


def too_long(what, block, shape):
    return Refused(f'the prompt has {what}, and the context of this model ends at {block} tokens: shorten it',
                   param='messages' if shape == 'chat' else 'prompt', code='context_length_exceeded')


def no_model(given, name):
    return Refused(f'there is no model {given!r:.60} here, only {name!r}', 404, param='model', code='model_not_found')


def answer(values, status=200, headers=None):
    """JSON in ASCII: half a surrogate pair, which some client sent, has no UTF-8."""
    return Response(json.dumps(values), status, headers, media_type='application/json')


class EventStream(StreamingResponse):
    """Server-sent events. gone: called at the end, however that comes."""

    def __init__(self, events, gone):
        super().__init__(events, media_type='text/event-stream',
                         headers={'cache-control': 'no-cache', 'x-accel-buffering': 'no'})
        self.gone = gone

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.gone()


class Process(uvicorn.Server):
    """uvicorn, which at Ctrl-C leaves a moment to running answers and then ends them."""

    def __init__(self, config, engine):
        super().__init__(config)
        self.engine = engine

    def handle_exit(self, sig, frame):
        if not self.should_exit and self.engine.active:
            print(f'\n{self.engine.active} answers are under way and have {GRACE:g} s to finish', flush=True)
        if not self.should_exit:
            timer = threading.Timer(GRACE * bool(self.engine.active), self.engine.close)
            timer.daemon = True
            timer.start()
        super().handle_exit(sig, frame)


def read_knob(name, text):
    """The api_key or what the system says, from itself or a file."""
    if not text.startswith('FILE:'):
        return text
    try:
        found = Path(text[5:]).read_text(encoding='utf-8').strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{name}={text}: {getattr(error, "strerror", None) or "not UTF-8 text"}') from None
    if not found:
        raise UserError(f'{name}={text}: the file is empty')
    return found


def listen(address, number):
    """A socket that is bound to an address."""
    # with the protocol named: else asyncio does not tell it to send small pieces at once, and each waits for 40 ms
    listener = socket.socket(socket.AF_INET6 if ':' in address else socket.AF_INET, socket.SOCK_STREAM,
                             socket.IPPROTO_TCP)
    try:
        if os.name != 'nt':  # where it would let two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, number))
        listener.listen(1024)
        return listener
    except (OSError, OverflowError) as error:
        listener.close()
        raise UserError(f'host={address} port={number}: {getattr(error, "strerror", None) or error}: give another '
                        '--port, or 0 for any that is free') from None


def main():
    _, given = runtime.configure(globals(), GPTConfig)
    secret, opening = read_knob('api_key', api_key), read_knob('system', system)
    if max_rows < 1 or max_queue < 1 or min(prefix_cache_tokens, max_think_tokens, num_waits) < 0:
        raise UserError('max_rows and max_queue must be >= 1, prefix_cache_tokens, max_think_tokens and num_waits >= 0')
    if host not in ('127.0.0.1', 'localhost', '::1') and not secret:
        raise UserError(f'host={host} lets other machines in: give --api_key=SECRET, which they must send')
    listener = listen(host, port)  # before the model is read, which takes a while
    model, tokenizer = load_to_generate(init_from, runtime.pick_device(device), dtype, quant, batch_invariant=True,
                                        **given)
    if model.config.n_encoder_layer or not model.config.causal:
        raise UserError(f'{init_from} is an encoder or has one: sample.py --source=TEXT talks to it')
    engine = Engine(model, tokenizer, max_rows, max_queue, prefix_cache_tokens,
                    forcing(tokenizer, tools, max_think_tokens, num_waits=num_waits, wait=wait))
    server = Server(engine, model_name or init_from, secret, opening)
    if opening and not server.chats:
        raise UserError(f'system={system}: {server.no_chats}')
    app = server.app()
    config = uvicorn.Config(app, log_level='warning', timeout_keep_alive=75, timeout_graceful_shutdown=10)
    at = f'http://{"[::1]" if ":" in host else host}:{listener.getsockname()[1]}'
    print(f'{init_from}, {model.num_params():,} parameters: talk to it at {at}, programs at {at}/v1; Ctrl-C ends',
          flush=True)
    try:
        Process(config, engine).run(sockets=[listener])
    finally:  # a thread in the midst of a product would abort the end of the process
        engine.close()
        if engine.thread.is_alive():
            engine.thread.join()


if __name__ == '__main__':
    runtime.cli(main)
