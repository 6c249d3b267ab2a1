"""
Talk to a checkpoint: continue a text, as tokens come, keep a context in an interactive session, or chat.

    python sample.py --init_from=out/tiny --start="ROMEO:"
    python sample.py --init_from=out/tiny --start=FILE:prompt.txt --num_samples=3 --temperature=0.9 --top_p=0.95
    printf "To be, or not" | python sample.py --init_from=out/tiny --start=-
    python sample.py --init_from=out/tiny --interactive=True
    python sample.py --init_from=smollm2 --chat=True [--start="What is the capital of France?"]
    python sample.py --init_from=out/sft --chat=True --system="Answer in one sentence."
    python sample.py --init_from=out/sft_tools --chat=True --tools=True             with a calculator
    python sample.py --init_from=mine --chat=True --tools=mine.py    with functions of yours, see tools.py
    python sample.py --init_from=out/sft --chat=True --start="…" --votes=16         the answer that most of 16 give
    python sample.py --init_from=out/sft --chat=True --start="…" --best_of=16 --reward_model=out/reward
    python sample.py --init_from=out/reverse --source="stressed" [--beams=4]    of an encoder-decoder
    python sample.py --init_from=out/tiny --start=FILE:prompt.txt --show=probs      how likely is each token of a text?
    python sample.py --init_from=out/tiny --start="To be, or not to be" --show=attention       what does each head see?
    python sample.py --init_from=smollm2 --chat=True --draft=out/small      a small model proposes, see speculative.py

Any field of GPTConfig may be set too: --window=512 --n_sink=4 streams without end (arXiv:2309.17453).

Papers: nucleus sampling (arXiv:1904.09751), min-p (arXiv:2407.01082), repetition penalty (arXiv:1909.05858),
self-consistency (arXiv:2203.11171), the best of n by a reward model (arXiv:2009.01325), beam search (arXiv:1609.08144).
"""
import functools
import json
import math
import random
import re
import sys
import time
from pathlib import Path

import runtime

import torch

import anatomy
from beam import beam_search
from generate import generate, stream
from grade import final_answers, majority
from load import fields_of, is_run, load_draft, load_to_generate
from model import GPTConfig
from plot import new_figure
from rollout import forcing, load_scorer
from tokenizer import UserError
from tools import turn_starts

# what to do
init_from = 'out/tiny'  # a run's directory or checkpoint, a Hugging Face directory, a .gguf file, smollm2, gpt2 …
start = '\n'  # text to continue; FILE:PATH reads it from a file, - from standard input
source = ''  # what the encoder of an encoder-decoder reads, text, FILE:PATH or -; it answers from <|endoftext|> on
interactive = False  # read text line by line and keep the context; /reset forgets it, /quit ends
chat = False  # take turns, as an instruct model expects; an answer to --start, or a session with /reset, /save, /quit
system = ''  # of a chat: what the system says first, text, FILE:PATH or -; empty: what the model's template says
num_samples = 1  # continuations of the same text; the first is shown as its tokens come
max_new_tokens = 500  # tokens to add, unless end-of-text comes first
# how tokens are drawn; a chat takes what is not given from the model's generation_config, or 0.2 and top_p=0.9
temperature = 0.8  # 0 = always the likeliest token, 1 = as the model has it
top_k = 0  # draw from the k likeliest tokens only; 0 = off
top_p = 1.0  # draw from the smallest set with this much probability; 1 = off
min_p = 0.0  # draw from tokens at least this likely relative to the likeliest; 0 = off
repetition_penalty = 1.0  # above 1: tokens that are already there become less likely
# beam search: nothing is drawn
beams = 0  # show the likeliest text that so many beams find, at once; 0 = off
length_penalty = 0.6  # of beams: log-probabilities are divided by ((5 + length) / 6) to this power; 0 = by nothing
# speculative decoding: the same distribution, in fewer passes of the model
draft = ''  # what proposes tokens: a model with the same tokenizer, as init_from, or 'heads', those of n_future
draft_tokens = 4  # tokens that are proposed at a time; by heads at most n_future
# of the answer
tools: bool | str = False  # True: the calculator answers <tool>…</tool>; FILE.py: functions that a chat may call
max_tool_calls = 8  # rounds of calls of functions in an answer
max_think_tokens = 0  # tokens after which <think> is closed; 0 = whenever it likes
num_waits = 0  # the first so many times that the model would close <think>, `wait` comes instead
wait = 'Wait'  # num_waits: what a thought goes on with
votes = 0  # of a chat: draw so many answers and show the first of those whose last number most have; 0 = off
best_of = 0  # of a chat: draw so many answers and show the one that reward_model scores highest; 0 = off
reward_model = ''  # of best_of: a run of reward.py, from the same base
# instead of an answer
show = ''  # of the text itself: 'probs', of each token, or 'attention', the maps of all layers and heads as a picture
show_file = ''  # of 'attention': where the picture goes, .png or .svg; empty: attention.png in the run's directory
# machine
seed = 1337  # the same seed gives the same samples; -1 = different every time
device = 'auto'  # 'cpu', 'cuda', 'mps'; auto = the best there is
dtype = 'auto'  # 'float32', 'bfloat16' or 'float16'; auto = 16 bits where the device is faster so
quant = 'auto'  # on a CPU: weights in 16 bits ('fp16') or 8 ('int8'); '' = as in dtype, auto = as is fast and exact


# what has no meaning in a beam search unless it has this value
NOT_DRAWN = dict(temperature=0, top_k=0, top_p=1, min_p=0, repetition_penalty=1, num_samples=1, draft='', tools=False,
                 max_think_tokens=0, num_waits=0, votes=0, best_of=0, show='')


def read_text(key, text):
    """The text of the knob `key`, from itself, FILE:PATH or standard input; UserError where there is none."""
    where = f'--{key}'
    try:
        if text == '-':
            where = 'standard input'
            text = sys.stdin.buffer.read().decode()
        elif text.startswith('FILE:'):
            where = text[5:]
            text = Path(where).read_text(encoding='utf-8')
    except UnicodeDecodeError as error:
        raise UserError(f'{where}: not UTF-8 text (byte {error.start})') from None
    except OSError as error:
        raise UserError(f'{where}: {error.strerror}; give a text file (--{key}=FILE:PATH)') from None
    if not text:
        raise UserError(f'{where} is empty: give some text, such as --{key}="ROMEO:"')
    return text


def stops(tokenizer):
    """The ids that end an answer, of which nothing is shown."""
    return tokenizer.turn_ids if chat else tokenizer.stop_ids


def sampling(tokenizer, force):
    """The options of `generate.generate` that the knobs ask for."""
    return dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, stop_ids=stops(tokenizer),
                repetition_penalty=repetition_penalty, vocab_limit=tokenizer.n_vocab, seed=None if seed < 0 else seed,
                force=force, draft=draft or None)


def answers(model, tokenizer, ids, sources, force):
    """Continues ids as `generate.stream` does; by a beam search, whose tokens all come at its end."""
    if not beams:
        return stream(model, [ids], max_new_tokens, num_samples=num_samples, sources=sources,
                      **sampling(tokenizer, force))
    ((best, _), *_), = beam_search(model, [ids], max_new_tokens, beams, length_penalty, stops(tokenizer),
                                   tokenizer.n_vocab, sources=sources)
    return (([0], [token], None) for token in best)


def continuations(model, tokenizer, ids, out, sources=None, force=None):
    """Continues ids into the num_samples lists of out, token by token, and prints the first as it grows."""
    decoder = tokenizer.stream(start=chat)  # else the text goes on
    began = time.perf_counter()
    with runtime.user_errors():
        for rows, tokens, _ in answers(model, tokenizer, ids, sources, force):
            for row, token in zip(rows, tokens, strict=True):
                out[row].append(token)
                if row == 0 and token not in stops(tokenizer):
                    print(decoder.push(token), end='', flush=True)
    print(decoder.flush())
    if draft:
        rate = sum(map(len, out)) / (time.perf_counter() - began)
        print(f'({draft.report()}, {rate:.1f} tokens/s)', file=sys.stderr)
        draft.reset()


def choose(model, tokenizer, ids, messages, scorer, force=None):
    """Draws votes or best_of answers to a chat, whose ids these are -> (the one to show, why, in words)."""
    with runtime.user_errors():
        new = generate(model, [ids], max_new_tokens, num_samples=votes or best_of, **sampling(tokenizer, force))
    answers = [plain(tokenizer, of) for of in new]
    if best_of:
        scores = scorer([(messages, answer) for answer in answers])
        first = int(scores.argmax())
        return answers[first], f'score {scores[first]:.2f}, the best of {best_of}; their mean is {scores.mean():.2f}'
    said = final_answers({}, answers)
    first, count = majority(said)
    if not count:
        return answers[0], f'none of {votes} answers has a number: this is the first'
    return answers[first], f'{count} of {votes} answers say {said[first]}'


def plain(tokenizer, ids):
    """The text of ids, in a chat of the last turn, without what ends it."""
    ids = ids[turn_starts(tokenizer, ids)[-1]:] if chat else ids
    return tokenizer.decode([i for i in ids if i not in stops(tokenizer)], start=chat)


def turn(model, tokenizer, messages, force=None):
    """The ids of a chat up to the assistant's answer, without its oldest turns where it is too long for the model."""
    first = messages[0]['role'] == 'system'  # stays
    seen = list(messages)
    while True:
        shown = force.tools.rows([{'prompt': seen}])[0]['prompt'] if force else seen  # with the signatures of functions
        ids, _ = tokenizer.chat_ids(shown, generate=True)
        if len(ids) < model.config.block_size or model.config.window:
            return ids
        if len(seen) < 3 + first:
            raise UserError(f'a message of {len(ids)} tokens does not fit into block_size={model.config.block_size}: '
                            'shorten it')
        ends = [i for i, m in enumerate(seen) if m['role'] == 'user']
        del seen[first:ends[1]]  # a question and its answer


def save_chat(path, messages):
    """Writes a chat as a row that sft.py learns from; says where, or why not."""
    try:
        with open(path, 'a', encoding='utf-8', newline='\n') as file:
            file.write(json.dumps({'messages': messages}, ensure_ascii=False) + '\n')
    except OSError as error:
        print(f'{path}: {error.strerror}')
    else:
        print(f'(added to {path})')


def session(model, tokenizer, force=None):
    """Lines from the keyboard join the context, the model goes on from there; Ctrl-C ends a continuation."""
    global seed
    what = 'Say something' if chat else 'Type a text to continue'
    keep = ', /save FILE adds the chat to a file' if chat else ''
    print(f'{model.num_params():,} parameters. {what}; /reset forgets the context{keep}, /quit ends.')
    opening = [{'role': 'system', 'content': system}] if system else []
    context, messages = [], list(opening)
    while True:
        try:
            line = input('> ')
        except (EOFError, KeyboardInterrupt):
            break
        command = line.split(' ')[0]
        if command == '/quit':
            break
        if command == '/reset':
            context, messages = [], list(opening)
            continue
        if chat and command == '/save':
            if len(messages) < 2 + len(opening):
                print('(nothing to save yet)')
            else:
                save_chat(line[5:].strip() or 'chat.jsonl', messages)
            continue
        if re.fullmatch('/[A-Za-z]+', command):
            known = ['/reset', '/quit', *['/save'] * chat]
            print(f'(no command {command}: {runtime.suggest(command, known)}; a blank before it makes it text)')
            continue
        if chat:
            messages.append({'role': 'user', 'content': line})
            try:
                ids = turn(model, tokenizer, messages, force)
            except UserError as error:  # a line too long to read costs that line, not the session
                print(f'({error})')
                messages.pop()
                continue
        else:
            # the model sees the end of the context; learned positions have room for a block, no more
            ids = (context + tokenizer.encode(line + '\n', start=not context))[-model.config.block_size:]
        out, calls = [[]], []
        try:
            continuations(model, tokenizer, ids, out, force=force and functools.partial(force, record=calls))
        except KeyboardInterrupt:
            print()
        context = ids + out[0]  # what is on the screen, also after Ctrl-C
        messages += [*calls, {'role': 'assistant', 'content': plain(tokenizer, out[0])}]
        seed += seed >= 0  # another draw next time, the same sequence of draws every session


def show_probs(model, tokenizer, ids):
    """Prints each token of a text with its probability, the entropy of what was expected in its place, in nats, and the
    likeliest token there; on a terminal green where it was expected and red where it was not."""
    if len(ids) > model.config.block_size:
        raise UserError(f'{len(ids)} tokens do not fit into block_size={model.config.block_size}: shorten the text')
    with torch.no_grad():
        logits = model(torch.tensor([ids], device=model.tok_emb.weight.device))[0, :, :tokenizer.n_vocab]
        logprobs = logits.log_softmax(-1).cpu()
    entropies, likeliest = -(logprobs.exp() * logprobs).sum(-1), logprobs.argmax(-1).tolist()
    said = logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0] if len(ids) > 1 else logprobs[:0, 0]

    def spelled(token):
        return repr(tokenizer.decode([token], start=False))
    print(f'{"probability":>11} {"entropy":>8}  token (entropies in nats)\n{"":>11} {"":>8}  {spelled(ids[0])}')
    for logprob, entropy, best, token in zip(said.tolist(), entropies.tolist(), likeliest, ids[1:], strict=False):
        p = math.exp(logprob)
        instead = '' if best == token else f'  rather {spelled(best)}'
        line = f'{p:>11.4f} {entropy:>8.2f}  {spelled(token)}{instead}'
        color = 32 if p >= 0.5 else 33 if p >= 0.05 else 31
        print(f'\033[{color}m{line}\033[0m' if sys.stdout.isatty() else line)
    nexts = logprobs[-1].topk(min(5, logprobs.shape[1])).indices.tolist()
    print(f'{"":>11} {entropies[-1]:>8.2f}  next: '
          + ', '.join(f'{spelled(i)} {logprobs[-1, i].exp():.2f}' for i in nexts))
    if len(said):
        print(f'{-said.mean():.4f} nats per token, perplexity {math.exp(min(-said.mean(), 99)):.2f}')


def show_attention(model, tokenizer, ids, source=None):
    """Draws what every head of every layer sees, a row of panels per layer, into show_file."""
    longest = max(len(ids), len(source or []))
    if longest > min(128, model.config.block_size):
        raise UserError(f'{longest} tokens are too many to be told apart in a picture: give '
                        f'{min(128, model.config.block_size)} at most')
    with runtime.user_errors():
        maps = anatomy.attention_maps(model, ids, source)
    said, read = ([tokenizer.decode([i], start=False) for i in text] for text in (ids, source or ids))
    side = min(max(1.6, 0.09 * longest), 160 / max(len(maps), len(maps[0][1])))  # a picture of 16,000 points at most
    figure, panels = new_figure(len(maps), max(len(weights) for _, weights in maps), side, side)
    for row, (name, weights) in zip(panels, maps, strict=True):
        for head, axes in enumerate(row):
            if head < len(weights):
                image = axes.imshow(weights[head].cpu().numpy(), cmap='Greys', vmin=0, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_title(f'{name}, head {head}', fontsize=6)
        if longest <= 40:
            seen = said if name.startswith('layer') and name.endswith('self') else read
            row[0].set_yticks(range(weights.shape[1]), read if name.startswith('encoder') else said, fontsize=5)
            for axes in row[:len(weights)]:
                axes.set_xticks(range(weights.shape[2]), seen, fontsize=5, rotation=90)
    figure.supylabel('the token that looks', fontsize=7)
    figure.supxlabel('the token that it looks at', fontsize=7)
    figure.colorbar(image, ax=panels, label='weight', fraction=0.03).ax.tick_params(labelsize=6)
    run = Path(init_from) if Path(init_from).is_dir() else Path(init_from).parent
    file = Path(show_file or (run if is_run(init_from) else Path()) / 'attention.png')
    try:
        figure.savefig(file, dpi=100)
    except (OSError, ValueError) as error:
        raise UserError(f'show_file={file}: {getattr(error, "strerror", None) or error}') from None
    print(f'{file}: {len(maps)} rows of layers, {len(maps[0][1])} heads, {len(ids)} tokens; row t of a panel is '
          'what token t sees')


def check_knobs(talk, given):
    """UserError for knobs that do not go together. talk: whether somebody types the questions; given: the knobs that
    somebody set."""
    drawing = [f'{key}={given[key]}' for key, off in NOT_DRAWN.items() if given.get(key, off) != off]
    choosing = f'votes={votes}' if votes else f'best_of={best_of}' if best_of else ''
    for wrong, why in (
            (system and not chat, '--system opens a chat: add --chat=True'),
            (show not in ('', 'probs', 'attention'), f"show={show!r} is not one of 'probs', 'attention'"),
            (show and (interactive or chat),
             f'show={show} is of a text: give --start=TEXT and no --chat or --interactive'),
            (show == 'probs' and source, 'show=probs is of running text: give --start=TEXT instead of --source'),
            (num_samples < 1 or max_new_tokens < 1, 'num_samples and max_new_tokens must be >= 1'),
            (source and (interactive or chat or start != '\n'),
             '--source is answered from the beginning: drop --start, --chat and --interactive'),
            (min(votes, best_of, max_think_tokens, num_waits, max_tool_calls) < 0,
             'votes, best_of, max_think_tokens, num_waits and max_tool_calls must be >= 0'),
            (isinstance(tools, str) and not chat, f'tools={tools} answers in turns of a chat: add --chat=True'),
            (draft_tokens < 1, f'draft_tokens={draft_tokens} must be >= 1'),
            (draft and (show or source), f'draft={draft} proposes tokens of a running text: drop --show and --source'),
            (draft and num_waits, f'num_waits={num_waits} takes tokens back, which goes without a draft: drop one'),
            (beams < 0 or not 0 <= length_penalty < math.inf,
             f'beams={beams} and length_penalty={length_penalty} must be >= 0, and finite'),
            (beams and drawing,
             f'beams={beams} searches for the likeliest text: drop {" and ".join(drawing)}'),
            (not beams and 'length_penalty' in given,
             f'length_penalty={length_penalty} weighs what beams find: add --beams=4, or drop it'),
            (votes and best_of, f'votes={votes} and best_of={best_of} choose in two ways: drop one'),
            (bool(best_of) != bool(reward_model), f'best_of={best_of} and reward_model={reward_model!r} go together: '
             'give --best_of=N and --reward_model=DIR, or neither'),
            (choosing and (talk or not chat),
             f'{choosing} answers one question: give --chat=True --start=TEXT and no --interactive'),
            (choosing and num_samples > 1, f'{choosing} shows one answer: drop --num_samples'),
            (temperature == 0 and votes + best_of > 1,
             f'{choosing} and temperature=0: all answers would be the same: raise it'),
            (talk and num_samples > 1, 'a session shows one answer: drop --num_samples')):
        if wrong:
            raise UserError(why)


def answer_once(model, tokenizer, text, force):
    """Prints the answer to one question, or the one that votes or a reward model choose."""
    scorer = None
    if best_of:
        run = runtime.Run('.', device, dtype, random.getrandbits(32) if seed < 0 else seed)
        scorer = load_scorer(reward_model, run, tokenizer)
    opening = [{'role': 'system', 'content': system}] if system else []
    messages = [*opening, {'role': 'user', 'content': text.rstrip('\n')}]
    ids = turn(model, tokenizer, messages, force)
    if votes or best_of:
        answer, why = choose(model, tokenizer, ids, messages, scorer, force)
        print(f'{answer}\n({why})')
    else:
        continue_text(model, tokenizer, ids, '', None, force)


def continue_text(model, tokenizer, ids, text, sources, force):
    """Prints text and num_samples continuations of its ids."""
    if len(ids) > model.config.block_size and model.config.pos != 'learned' and not model.config.window:
        print(f'(the start has {len(ids)} tokens; the model sees the last {model.config.block_size})', file=sys.stderr)
    print(text, end='', flush=True)
    out = [[] for _ in range(num_samples)]
    continuations(model, tokenizer, ids, out, sources, force)
    for i, new in enumerate(out[1:], 2):
        print(f'--- {i} of {num_samples}\n{text}{plain(tokenizer, new)}')


def main():
    global draft, system
    _, given = runtime.configure(globals(), GPTConfig, __file__)
    talk = interactive or chat and start == '\n'
    check_knobs(talk, given)
    system = read_text('system', system) if system else ''
    text = None if talk else read_text('source', source) if source else read_text('start', start)
    how = dict(device=runtime.pick_device(device), dtype=dtype, quant=quant)
    model, tokenizer = load_to_generate(init_from, **how, **fields_of(GPTConfig, given))
    draft = draft and load_draft(draft, draft_tokens, model, tokenizer, **how)
    if (model.config.n_encoder_layer > 0) != bool(source):
        raise UserError(f'{init_from} has ' + ('no encoder that could read --source: drop it' if source else
                                               'an encoder: give it something to read, --source=TEXT'))
    if chat:
        tokenizer.chat_ids([{'role': 'user', 'content': ''}])  # a tokenizer that knows no chats says so now
        if not votes and not best_of:  # which choose among answers that differ
            globals().update({key: value for key, value in tokenizer.sampling.items() if key not in given})
    force = forcing(tokenizer, tools, max_think_tokens, max_tool_calls, num_waits, wait)
    if talk:
        return session(model, tokenizer, force)
    if chat:
        return answer_once(model, tokenizer, text, force)
    ids, sources = tokenizer.encode(text), None
    if source:
        ids, sources, text = [tokenizer.eot], [tokenizer.encode(text.removesuffix('\n'))], ''
    elif tokenizer.bos is not None:
        ids = [tokenizer.bos, *ids]
    if show == 'probs':
        return show_probs(model, tokenizer, ids)
    if show:
        if source:  # what it answers, to be looked at
            ids += generate(model, [ids], min(max_new_tokens, 128), temperature=0, stop_ids=stops(tokenizer),
                            sources=sources, vocab_limit=tokenizer.n_vocab)[0][:-1]
        return show_attention(model, tokenizer, ids, sources[0] if sources else None)
    continue_text(model, tokenizer, ids, text, sources, force)


if __name__ == '__main__':
    runtime.cli(main)
