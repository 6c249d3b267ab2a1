"""
Talk to a checkpoint: continue a text, as tokens come, or keep a context in an interactive session.

    python sample.py --init_from=out/tiny --start="ROMEO:"
    python sample.py --init_from=out/tiny --start=FILE:prompt.txt --num_samples=3 --temperature=0.9 --top_p=0.95
    printf "To be, or not" | python sample.py --init_from=out/tiny --start=-
    python sample.py --init_from=out/tiny --interactive=True

Papers: nucleus sampling (arXiv:1904.09751), min-p (arXiv:2407.01082), repetition penalty (arXiv:1909.05858).
"""
import sys
from pathlib import Path

import runtime
from model import GPT
from tokenizer import Tokenizer, UserError

init_from = 'out/tiny'  # directory of a run (its best.pt, else ckpt.pt), or a checkpoint file
start = '\n'  # text to continue; FILE:PATH reads it from a file, - from standard input
interactive = False  # read text line by line and keep the context; /reset forgets it, /quit ends
num_samples = 1  # continuations of the same text; the first is shown as its tokens come
max_new_tokens = 500  # tokens to add, unless end-of-text comes first
temperature = 0.8  # 0 = always the likeliest token, 1 = as the model has it
top_k = 0  # draw from the k likeliest tokens only; 0 = off
top_p = 1.0  # draw from the smallest set with this much probability; 1 = off
min_p = 0.0  # draw from tokens at least this likely relative to the likeliest; 0 = off
repetition_penalty = 1.0  # above 1: tokens that are already there become less likely
seed = 1337  # the same seed gives the same samples; -1 = different every time
device = 'auto'  # 'cpu', 'cuda', 'mps'; auto = the best there is
dtype = 'auto'  # 'float32', 'bfloat16' or 'float16'; auto = 16 bits where the device is faster so


def read_start(text):
    """The text to continue, from the knob itself, FILE:PATH or standard input; UserError where there is none."""
    where = '--start'
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
        raise UserError(f'{where}: {error.strerror}; give a text file (--start=FILE:PATH)') from None
    if not text:
        raise UserError(f'{where} is empty: give some text to continue, such as --start="ROMEO:"')
    return text


def load(path, device):
    """A model in evaluation mode and its tokenizer, from the directory of a run."""
    state = runtime.load_checkpoint(path)
    with runtime.user_errors(path):
        tokenizer = Tokenizer.from_dict(state['tokenizer'])
        model = GPT.from_state(state)
        if tokenizer.n_vocab > model.config.vocab_size:
            raise ValueError(f'its tokenizer has {tokenizer.n_vocab} tokens, its model {model.config.vocab_size}')
    return model.to(device, runtime.pick_dtype(dtype, device, model.num_params())[1]).eval(), tokenizer


def continuations(model, tokenizer, ids, out):
    """Continues ids into the num_samples lists of out, token by token, and prints the first as it grows."""
    decoder = tokenizer.stream()
    options = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, stop_ids=(tokenizer.eot,),
                   repetition_penalty=repetition_penalty, num_samples=num_samples, vocab_limit=tokenizer.n_vocab,
                   seed=None if seed < 0 else seed)
    with runtime.user_errors():
        for rows, tokens, _ in model.stream([ids], max_new_tokens, **options):
            for row, token in zip(rows, tokens, strict=True):
                out[row].append(token)
                if row == 0 and token != tokenizer.eot:
                    print(decoder.push(token), end='', flush=True)
    print(decoder.flush())


def session(model, tokenizer):
    """Lines from the keyboard join the context, the model goes on from there; Ctrl-C ends a continuation."""
    global seed
    print(f'{model.num_params():,} parameters. Type a text to continue; /reset forgets the context, /quit ends.')
    context = []
    while True:
        try:
            line = input('> ')
        except (EOFError, KeyboardInterrupt):
            break
        if line == '/quit':
            break
        if line == '/reset':
            context = []
            continue
        # the model sees the end of the context; learned positions have room for a block, no more
        context = (context + tokenizer.encode(line + '\n'))[-model.config.block_size:]
        out = [[]]
        try:
            continuations(model, tokenizer, context, out)
        except KeyboardInterrupt:
            print()
        context += out[0]  # what is on the screen, also after Ctrl-C
        seed += seed >= 0  # another draw next time, the same sequence of draws every session


def main():
    runtime.configure(globals())
    if num_samples < 1 or max_new_tokens < 1:
        raise UserError('num_samples and max_new_tokens start at 1')
    if interactive and num_samples > 1:
        raise UserError('an interactive session shows one continuation: drop --num_samples')
    text = None if interactive else read_start(start)
    model, tokenizer = load(init_from, runtime.pick_device(device))
    if interactive:
        return session(model, tokenizer)
    ids = tokenizer.encode(text)
    if len(ids) > model.config.block_size and model.config.pos != 'learned':
        print(f'(the start has {len(ids)} tokens; the model sees the last {model.config.block_size})', file=sys.stderr)
    print(text, end='', flush=True)
    out = [[] for _ in range(num_samples)]
    continuations(model, tokenizer, ids, out)
    for i, new in enumerate(out[1:], 2):
        print(f'--- {i} of {num_samples}\n{text}{tokenizer.decode([t for t in new if t != tokenizer.eot])}')


if __name__ == '__main__':
    runtime.cli(main)
