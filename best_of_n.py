"""
How good are answers that reward models choose: of a policy's n answers to a held-out prompt the one with the highest
score, and of a policy that was trained on that score. Measurements of several policies together show over-optimisation:
the score rises on, and the true quality falls.

    python best_of_n.py --init_from=out/sft_mixed --tools=True --reward_models=out/reward_own --num_samples=256
    python best_of_n.py --init_from=out/ppo --reference=out/sft_mixed --tools=True --reward_models=out/reward_own \\
        --num_samples=1 --label=PPO                             a policy at its distance from the one it began as
    python best_of_n.py --init_from=out/sft_mixed --tools=True --budgets=8,16,32,0 --waits=1,2 --name=budgets
                                                            what thinking is worth: greedy answers, it cut or prolonged
    python best_of_n.py --draw='out/best_of_n/*.json'           pictures of what was measured, and laws fitted to it

The true quality is `grade.quality`'s gold, which word problems have and no reward model sees; of other rows the share
that is correct. The best of n answers is log n - (n - 1) / n nats away from one answer, in KL.

Papers: scaling laws for reward model over-optimisation (arXiv:2210.10760), the estimator of the best of n over all
choices of n samples (arXiv:2009.01325), votes (arXiv:2203.11171), budgets for thinking (arXiv:2501.19393).
"""
import glob
import json
import math
import re
from pathlib import Path

import runtime

import numpy as np

from dataset import find_dataset
from grade import best_at_k, difference, final_answers, interval, is_correct, maj_at_k, pass_at_k, t_quantile
from load import load_model
from plot import draw_mean, mean_and_spread, new_figure
from rollout import compute_all_logprobs, forcing, generate_rollouts, gold_scores, load_prompt_data, load_scorer
from rows import is_file_of_rows
from tokenizer import UserError

# what is measured
init_from = 'out/sft'  # policy that answers, as in sample.py
reference = ''  # policy that it began as: KL is estimated from the answers; '' = the same policy, KL 0
reward_models = ''  # runs of reward.py that choose: directories, or NAME=DIRECTORY, with commas between them
dataset = 'wordproblems'  # folder in data/ (prepared if it is not yet), path of a folder or of a file of rows
val_fraction = 0.1  # fraction of the prompts that is held out when dataset is a single file
split = 'test'  # split that prompts are from: 'val', 'test', 'unseen' or 'train'
rows = 200  # prompts, the same every time; 0 = all
num_samples = 64  # answers to each prompt: the largest n
temperature = 1.0  # of sampling
max_new_tokens = 160  # maximum length of an answer, in tokens
tools = False  # run the calculator: after <tool>…</tool> its result is inserted into the answer
budgets = ''  # measure greedy answers whose <think> is closed after 8, 16 … tokens, '8,16,0'; 0 = no limit
waits = ''  # and answers that go on with `wait` the first 1, 2 … times that they would close it, '1,2'
wait = 'Wait'  # what they go on with
seed = 1337  # of the samples; measurements that differ in it alone are drawn together
strict = True  # stop at a malformed row; False: skip and count it
# where it goes
out_dir = 'out/best_of_n'  # a file for each measurement, and the picture
name = ''  # the file's name; '' = that of the policy
label = ''  # what it is called in the picture: measurements with one label are seeds, or points along a run
draw = ''  # draw measurements instead: a pattern of files, with commas between several
# machine
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'; auto = the best available
dtype = 'auto'  # 'float32', 'bfloat16' or 'float16'; auto = 16 bits if the device is faster at it

RANGES = {'val_fraction': '> 0 and < 1', 'rows': '>= 0', 'num_samples': '>= 1', 'temperature': '> 0',
          'max_new_tokens': '>= 1', 'split': ('val', 'test', 'unseen', 'train')}


# ----------------------------------------------------------------------------------------------------------------------
# the maths

def best_of_n_kl(n):
    """KL(best of n || one answer) in nats, of answers that are all different (arXiv:2009.01325, appendix G.3)."""
    return math.log(n) - (n - 1) / n


def fit(kl, gains, rl):
    """The law of a gain over the KL, arrays (k,) -> (alpha, beta), by least squares (arXiv:2210.10760, 3.1):

        best of n                 gain = d (alpha - beta d)          d = sqrt(KL)
        reinforcement learning    gain = d (alpha - beta log d)
    """
    d = np.sqrt(kl[kl > 0])
    columns = np.stack((d, -d * (np.log(d) if rl else d)), 1)
    return np.linalg.lstsq(columns, gains[kl > 0], rcond=None)[0]


def law(d, alpha, beta, rl):
    """The gain at d = sqrt(KL) by a law of `fit`."""
    return d * (alpha - beta * (np.log(np.maximum(d, 1e-9)) if rl else d))


def peak(alpha, beta, rl):
    """The sqrt(KL) of the highest gain by a law of `fit`; inf where it never falls."""
    if beta <= 0:
        return math.inf
    return math.exp(alpha / beta - 1) if rl else alpha / (2 * beta)


def fall(values):
    """How far the last point lies below the highest one, (S seeds, P prompts, K points) -> the mean and its 95 %
    interval over prompts.

    The highest point of one half of the prompts is read off in the other: at a maximum of noise the last one would
    always seem to be lower.
    """
    by_prompt = values.mean(0)
    falls = np.empty(len(by_prompt))
    for half in (0, 1):
        top = by_prompt[1 - half::2].mean(0).argmax()
        falls[half::2] = by_prompt[half::2, top] - by_prompt[half::2, -1]
    half = t_quantile(len(falls) - 1) * falls.std(ddof=1) / math.sqrt(len(falls))
    return falls.mean(), falls.mean() - half, falls.mean() + half


# ----------------------------------------------------------------------------------------------------------------------
# measuring

def load_policy(run):
    """The policy, its tokenizer, the data with the prompts and which of its rows these are."""
    model, tokenizer = load_model(init_from)
    if not is_file_of_rows(dataset):
        find_dataset(dataset)
    data = load_prompt_data(run, dataset, split, tokenizer, model.config.block_size, max_new_tokens, 0, strict,
                            val_fraction)
    if missing := next((row['where'] for row in data.rows_kept if 'answer' not in row), None):
        raise UserError(f'{missing}: it has no "answer" to tell how good the chosen answers are: add it')
    return model.to(run.device).eval(), tokenizer, data, data.fixed(rows)


def thinking_tokens(tokenizer, ids):
    """How many of the ids of an answer are between <think> and </think>, or its end."""
    ends = np.cumsum([len(tokenizer.decode_bytes([i])) for i in ids])
    before, opened, rest = tokenizer.decode_bytes(ids).partition(b'<think>')
    start = len(before) + len(opened)
    return int(((ends > start) & (ends <= start + len(rest.partition(b'</think>')[0]))).sum()) if opened else 0


def measure_budgets(run):
    """Tokens of thinking and whether the greedy answer is correct, for each budget and number of waits -> points."""
    if reward_models or reference:
        raise UserError('budgets and waits are of greedy answers alone: drop reward_models and reference')
    if not re.fullmatch(r'(\d+(,|$))*', f'{budgets},{waits}'.strip(',')):
        raise UserError(f'budgets={budgets!r}, waits={waits!r}: give whole numbers with commas between them')
    model, tokenizer, data, chosen = load_policy(run)
    points = []
    for budget, count in [(int(n), 0) for n in budgets.split(',') if n] + [(0, int(n)) for n in waits.split(',') if n]:
        force = forcing(tokenizer, tools, budget, num_waits=count, wait=wait)
        answers = generate_rollouts(model, data, chosen, run, max_new_tokens, 1, 0, force=force)
        points.append({'budget': budget, 'waits': count, 'wait': wait if count else '',
                       'tokens': [thinking_tokens(tokenizer, ids) for ids in answers.ids],
                       'correct': [float(is_correct(data.rows_kept[i], text))
                                   for i, text in zip(answers.rows, answers.texts, strict=True)]})
    return points


def measure(run):
    """Answers, their scores and their quality -> points, one for each chooser and n."""
    model, tokenizer, data, chosen = load_policy(run)
    block_size = model.config.block_size
    scorers = {}
    for item in filter(None, reward_models.split(',')):
        chooser, _, path = item.rpartition('=')
        scorers[chooser or Path(path).name] = load_scorer(path, run, tokenizer)
    answers = generate_rollouts(model, data, chosen, run, max_new_tokens, num_samples, temperature, 1,
                                max(1, 512 // num_samples), forcing(tokenizer, tools))
    shape = len(chosen), num_samples
    kept = [data.rows_kept[i] for i in answers.rows]
    right = np.array([float(is_correct(row, text)) for row, text in zip(kept, answers.texts, strict=True)])
    gold = gold_scores(data, answers)
    gold = np.where(np.isnan(gold), right, gold)
    pairs = [(row['prompt'], text) for row, text in zip(kept, answers.texts, strict=True)]
    scores = {scorer: score(pairs).reshape(shape).tolist() for scorer, score in scorers.items()}
    kl = np.zeros(shape)
    if reference:
        before, other = load_model(reference)
        if not other.same_as(tokenizer):
            raise UserError(f'{reference}: its tokenizer is not that of {init_from}: it did not begin as this')
        logprobs, before = (compute_all_logprobs(net.to(run.device), run, answers, block_size, temperature,
                                                 entropies=False)[0] for net in (model, before))
        kl = (logprobs - before).sum(1).reshape(shape)
    right, gold = right.reshape(shape).tolist(), gold.reshape(shape).tolist()
    votes = [final_answers(data.rows_kept[i], answers.texts[k * num_samples:(k + 1) * num_samples])
             for k, i in enumerate(chosen)]
    points = []
    for n in sorted({*(2 ** i for i in range(12) if 2 ** i < num_samples), num_samples}):
        for chooser, table in scores.items():
            best = {measure: [best_at_k(by, values, n) for by, values in zip(table, of, strict=True)]
                    for measure, of in (('proxy', table), ('gold', gold), ('correct', right))}
            points.append({'chooser': chooser, 'n': n} | best)
        points.append({'chooser': 'vote', 'n': n,
                       'correct': [maj_at_k(vote, hits, n) for vote, hits in zip(votes, right, strict=True)]})
        points.append({'chooser': 'oracle', 'n': n,
                       'correct': [pass_at_k(num_samples, int(sum(hits)), n) for hits in right]})
    for point in points:
        point['kl'] = best_of_n_kl(point['n']) + float(kl.mean())
    return points


def mean_of(values):
    """'mean (low to high)' of numbers, with the 95 % interval over prompts."""
    low, high = interval(values)
    return f'{np.mean(values):.3f} ({low:.3f} to {high:.3f})'


# ----------------------------------------------------------------------------------------------------------------------
# drawing

def read_points(files):
    """Files of measurements -> {seed: points} for each series: of budgets by (label, what is varied), of choosers by
    (label, chooser), of reward models by (label, chooser, rl). UserError where seeds are of other prompts or points."""
    by_budget, by_chooser, by_kl = {}, {}, {}
    for file in files:
        try:
            found = json.loads(Path(file).read_text(encoding='utf-8'))
            for point in found['points']:
                keys = []
                if 'budget' in point:
                    keys.append((by_budget, (found['label'], repr(point['wait']) if point['waits'] else 'budgets')))
                elif not found['reference']:
                    keys.append((by_chooser, (found['label'], point['chooser'])))
                if 'proxy' in point and (point['n'] == 1 or not found['reference']):
                    keys.append((by_kl, (found['label'], point['chooser'], bool(found['reference']))))
                for series, key in keys:
                    series.setdefault(key, {}).setdefault(found['seed'], []).append(point)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f'{file} is no measurement of best_of_n.py ({type(error).__name__}: {error})') from None
    for key, seeds in (by_budget | by_chooser).items():
        if len({tuple(len(point['correct']) for point in points) for points in seeds.values()}) > 1:
            raise UserError(f'{key[0]}, {key[1]}: its seeds have other prompts or points: give other labels')
    return by_budget, by_chooser, by_kl


def percent(seeds):
    """Means of seeds -> 'mean (of each)', in percent."""
    return f'{100 * np.mean(seeds):.1f}' + f' ({", ".join(f"{100 * value:.1f}" for value in seeds)})' * (len(seeds) > 1)


def first_seed(seeds):
    """The points of the first of {seed: points}."""
    return next(iter(seeds.values()))


def by_prompt(seeds, at):
    """Which answers are correct at the point number `at` of each seed, a mean over the seeds: (P,)."""
    return np.mean([points[at]['correct'] for points in seeds.values()], 0)


def name_axes(axes, x):
    """Finishes a panel of shares over x."""
    low, high = axes.get_ylim()
    axes.set_ylim(max(0, low), min(1, high))
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel('share correct', fontsize=8)
    axes.legend(frameon=False, fontsize=6)


def draw_choosers(series, path):
    """The share of correct answers over n, a panel for each label -> lines of a table, with what each chooser gains on
    the vote at the largest n, prompt by prompt."""
    labels = list(dict.fromkeys(label for label, _ in series))
    figure, (panels,) = new_figure(1, len(labels), 5, 3.6)
    sizes = [point['n'] for point in first_seed(next(iter(series.values())))]
    lines = ['| chosen by | ' + ' | '.join(f'n = {n}' for n in sizes) + f' | less the vote, n = {sizes[-1]} |',
             '| --- |' + ' --- |' * (len(sizes) + 1)]
    for label, axes in zip(labels, panels, strict=True):
        mine = {chooser: seeds for (of, chooser), seeds in series.items() if of == label}
        for color, (chooser, seeds) in enumerate(mine.items()):
            curves = [[(point['n'], float(np.mean(point['correct']))) for point in points] for points in seeds.values()]
            draw_mean(axes, color, chooser, curves)
            gain = difference((by_prompt(seeds, -1) - by_prompt(mine['vote'], -1)).tolist(), 'prompts')
            shares = ' | '.join(percent([y for _, y in at]) for at in zip(*curves, strict=True))
            lines.append(f'| {label}, {chooser} | {shares} | {gain if chooser != "vote" else ""} |')
        axes.set_xscale('log', base=2)
        axes.set_title(label, fontsize=9)
        name_axes(axes, 'n, answers to choose from')
    figure.savefig(path)
    return lines


def draw_budgets(series, path):
    """The share of correct answers over the mean number of tokens in <think> -> lines of a table, with what each gains
    on thoughts that end as they like, prompt by prompt."""
    figure, ((axes,),) = new_figure(1, 1, 5, 3.6)
    lines = ['| thought | tokens | correct | less the one that ends as it likes |', '| --- | --- | --- | --- |']
    in_order = sorted(series.items(), key=lambda item: (item[0][0], item[0][1] != 'budgets'))
    for color, ((label, what), seeds) in enumerate(in_order):
        free = {seed: [point for point in points if not point['budget']][:1]
                for seed, points in series.get((label, 'budgets'), {}).items()}
        if what != 'budgets':  # where its line begins
            seeds = {seed: free.get(seed, []) + points for seed, points in seeds.items()}
        tokens, correct = (np.array([[np.mean(point[key]) for point in points] for points in seeds.values()])
                           for key in ('tokens', 'correct'))
        means, spreads = zip(*map(mean_and_spread, correct.T.tolist()), strict=True)
        order = tokens.mean(0).argsort()
        axes.errorbar(tokens.mean(0)[order], np.array(means)[order], np.array(spreads)[order], color=f'C{color}',
                      marker='.', capsize=2, linewidth=1.2, label=f'{label}, {what}')
        for i, point in enumerate(first_seed(seeds)):
            said = f'{point["waits"]} times {what}' if point['waits'] else \
                f'at most {point["budget"]} tokens' if point['budget'] else 'ends as it likes'
            gain = ''
            if any(free.values()):
                gain = difference((by_prompt(seeds, i) - by_prompt(free, 0)).tolist(), 'prompts')
            if point['waits'] or what == 'budgets':
                lines.append(f'| {label}, {said} | {tokens[:, i].mean():.1f} | {percent(correct[:, i])} | {gain} |')
    name_axes(axes, 'tokens of thinking, mean')
    figure.savefig(path)
    return lines


def read_series(series):
    """Points of reward models, see `read_points` -> {(label, chooser, rl): {seed: (kl (K,), {measure: (P, K)})}}, by
    their KL."""
    for key, seeds in series.items():
        for number, points in seeds.items():
            points.sort(key=lambda point: point['kl'])
            values = {measure: np.array([point[measure] for point in points]).T for measure in ('proxy', 'gold')}
            seeds[number] = np.array([point['kl'] for point in points]), values
            if abs(seeds[number][0][0]) > 1e-6 or len(points) < 3:
                raise UserError(f'{key[0]}, seed {number}: {len(points)} points from KL {points[0]["kl"]:.3f} on: a '
                                'law needs three, and the first at KL 0: measure the reference with this label, too')
    return series


def draw_series(series, path):
    """Two rows, true quality and the reward model's score; a column for the best of n and one for policies -> lines of
    a table: the laws' coefficients and how far the true quality falls, each with its 95 % interval."""
    columns = sorted({key[2] for key in series})
    figure, panels = new_figure(2, len(columns), 5, 3.2)
    lines = ['| series | measure | alpha | beta | peak, KL | KL reached | at KL 0, highest, last | fall since then |',
             '| --- | --- | --- | --- | --- | --- | --- | --- |']
    for color, ((label, chooser, rl), seeds) in enumerate(series.items()):
        for row, measure in enumerate(('gold', 'proxy')):
            axes = panels[row][columns.index(rl)]
            reach = max(kl[-1] for kl, _ in seeds.values())
            grid, curves, laws = np.linspace(0, math.sqrt(reach), 100), [], []
            for kl, values in seeds.values():
                means = values[measure].mean(0)
                laws.append(fit(kl, means - means[0], rl))
                curves.append(means[0] + law(grid, *laws[-1], rl))
                axes.plot(np.sqrt(kl), means, '.', color=f'C{color}', markersize=3)
            draw_mean(axes, color, f'{label}, {chooser}', [list(zip(grid, curve, strict=True)) for curve in curves])
            axes.set_title(('best of n', 'policies')[rl], fontsize=9)
            axes.set_xlabel('square root of KL, nats', fontsize=8)
            axes.set_ylabel('true quality' if measure == 'gold' else "reward model's score", fontsize=8)
            coefficients = ['{:.3f} ± {:.3f}'.format(*mean_and_spread(column.tolist())) for column in np.array(laws).T]
            highest = peak(*np.mean(laws, 0), rl) ** 2
            K = min(len(kl) for kl, _ in seeds.values())
            P = min(values[measure].shape[0] for _, values in seeds.values())
            values = np.stack([values[measure][:P, [*range(K - 1), -1]] for _, values in seeds.values()])
            means = values.mean((0, 1))
            down, low, high = fall(values)
            lines.append(f'| {label}, {chooser}, {len(seeds)} seeds | {measure} | {" | ".join(coefficients)} | '
                         f'{"none" if highest > reach else f"{highest:.2f}"} | {reach:.2f} | {means[0]:.3f}, '
                         f'{means.max():.3f}, {means[-1]:.3f} | {down:.3f} ({low:.3f} to {high:.3f}) |')
    for axes in panels.flat:
        axes.legend(frameon=False, fontsize=6)
    figure.savefig(path)
    return lines


def main():
    config, _ = runtime.configure(globals())
    runtime.check_ranges(config, RANGES)
    folder = Path(out_dir)
    if draw:
        files = sorted({file for pattern in draw.split(',') for file in glob.glob(pattern)})
        if not files:
            raise UserError(f'draw={draw!r}: no such file: measure first')
        folder.mkdir(parents=True, exist_ok=True)
        by_budget, by_chooser, by_kl = read_points(files)
        for picture, draw_them, series in (('budgets.svg', draw_budgets, by_budget),
                                           ('choosers.svg', draw_choosers, by_chooser),
                                           ('best_of_n.svg', draw_series, read_series(by_kl))):
            if series:
                print('\n'.join([*draw_them(series, folder / picture), f'drawn to {folder / picture}']))
        return
    greedy = budgets or waits
    points = (measure_budgets if greedy else measure)(runtime.Run('', device, dtype, seed))
    found = {'label': label or Path(init_from).name, 'seed': seed, 'init_from': init_from, 'reference': reference,
             'dataset': dataset, 'split': split, 'temperature': 0 if greedy else temperature, 'points': points}
    print(f'{init_from} on {len(points[0]["correct"])} prompts of {dataset}, {split}: 95 % intervals')
    for point in points:
        shown = [f'{measure} {mean_of(point[measure])}' for measure in ('tokens', 'correct', 'gold', 'proxy')
                 if measure in point]
        what = (f'{point["chooser"]}, best of {point["n"]}, KL {point["kl"]:.2f}' if 'n' in point else
                f'a budget of {point["budget"] or "any"} tokens, {point["waits"]} waits')
        print(f'{what}: {", ".join(shown)}')
    file = folder / f'{name or Path(init_from).name}.json'
    folder.mkdir(parents=True, exist_ok=True)
    runtime.write_atomic(file, lambda out: out.write(json.dumps(found).encode()))
    print(f'written to {file}')


if __name__ == '__main__':
    runtime.cli(main)
