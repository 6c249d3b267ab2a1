"""
An answer against its gold: graders, exact match, F1 and ROUGE-L, the quality of a worked solution, pass@k, maj@k and
best@k, and 95 % intervals.

    grade('They pick 58.', '58', 'number')        is it right?
    marks = [grades(row, text) for row, text in zip(rows, answers)]
    means, ranges = summarise(marks)
"""
import json
import math
import re
import string
import zlib
from collections import Counter
from decimal import Decimal
from fractions import Fraction

import math_answers
from chat import CALL
from errors import UserError

# A minus after a word, a number or a bracket takes away from that; commas that set off no thousands separate numbers;
# an e in a number is a power of ten, unless a letter touches the number: 'step2e3' ends in 3.
DECIMAL = r'(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?'
SCIENTIFIC = rf'(?<![\w.])(?:{DECIMAL}|\.[0-9]+)[eE][-+−]?[0-9]+(?!\w|\.[0-9])'
UNSIGNED = rf'{SCIENTIFIC}|{DECIMAL}|(?<![\w.])\.[0-9]+'
NUMBER = re.compile(rf'((?<![\w)\]}}])[-−])?\$?({UNSIGNED})(?:/({UNSIGNED}))?')
GOLD = re.compile(rf'(?:\+(?![-−])|\$(?=[-−]))?{NUMBER.pattern}\.?')  # nothing but a number
HUGE = re.compile('[eE].?0*[1-9][0-9]{3}')  # Python would spell out such a power for ever
MARKS = re.compile(r'(?<!\w)-(?=\.?\d)|(?<=\d)[^\w\s](?=\d)')  # of numbers: the minus, and '.', ',', '/', ':' … inside
GRADERS = {  # by name, whether a text's answer is gold that `check_gold` lets pass
    'number': lambda text, gold: (due := gold_number(gold)) is not None and last_number(text) == due,
    'exact': lambda text, gold: exact_form(text) == exact_form(gold),
    'math': lambda text, gold: math_answers.equal(spelled_out(gold), spelled_out(text), decimals_of(gold_number(gold))),
}


def follows_format(text):
    """Whether a text is one <think> … </think> and then an answer, and nothing else."""
    return bool(re.fullmatch(r'\s*<think>(?:(?!</?think>).)*</think>(?=.*\S)(?:(?!</?think>).)*', text, re.S))


def grade(text, gold, grader):
    """Whether an answer is right: 'number', its last number is gold; 'exact', both are the same in `exact_form`;
    'math', both are mathematically equal, see `math_answers.py`.

    Only the `visible` text counts, not the thoughts. UserError for another grader.
    """
    if grader not in GRADERS:
        raise UserError(f'"grader" is {grader!r}, not one of {", ".join(GRADERS)}: fix it in the rows')
    return GRADERS[grader](visible(text), str(gold))


def check_gold(gold, grader):
    """UserError for gold that this grader would misread, or that no answer could equal."""
    text = str(gold)
    number = gold_number(text)
    if grader == 'number' and number is None:
        raise UserError(f'"answer" {gold!r:.40} is not one plain number, which the grader \'number\' needs: give that '
                        'alone, or "grader": "exact" for words, "math" for mathematics')
    if grader == 'exact' and not text.strip():
        raise UserError('"answer" is empty: give what is right, or leave it out')
    if grader == 'math' and not math_answers.readable(spelled_out(text) if number is None else '0'):
        raise UserError(f'"answer" {gold!r:.40} is no formula that the grader \'math\' reads whole: write it in LaTeX, '
                        'with words in \\text{…}, or give "grader": "exact"')


def is_correct(row, text):
    """Whether an answer to a row with an `answer` is right by the row's `grader`, which is 'number' unless given."""
    return grade(text, row['answer'], row.get('grader', 'number'))


# weights of the parts of an answer's quality
QUALITY = {'correct': 0.5, 'working': 0.2, 'complete': 0.1, 'concise': 0.1, 'polite': 0.1}
RUDE = re.compile(r'\b(stupid|dumb|idiot|fool|moron|lazy|pathetic|clueless|annoying|brainless|shut up|waste of time)\b',
                  re.I)
# a call of the calculator, with its result if it has one; one that is not closed extends to the end of the text
TOOL = re.compile(rf'{CALL.pattern}(?:\[([^][\n]*)\])?|<tool>(?:(?!</?tool>).)*\Z', re.S)
EQUATION = re.compile(r'(\d+) ([-+*/]) (\d+) = (\d+)(?: remainder (\d+))?\b')


def quality(row, text):
    """The true quality of an answer to a word problem, from 0 to 1, and its parts -> {'gold', and the keys of QUALITY};
    {} where the row is none: nobody then knows what the working should be. One has `answer`, `steps` and `kind`.

    correct: see `is_correct`; working: the fraction of lines between <think> and </think> that are true equations, or
    of the row's `steps` if these are more; complete: it ends as a sentence does; concise: at most one sentence follows
    the working; polite: no word of RUDE. An empty answer is polite and has no other part.
    """
    if not {'answer', 'steps', 'kind'} <= row.keys():
        return {}
    said = visible(text)
    thoughts = re.findall(r'<think>(.*?)(?:</think>|\Z)', text, re.S)
    lines = [line for thought in thoughts for line in rendered(thought).split('\n') if line]
    right = sum(map(_is_true, lines))
    parts = {'correct': float(is_correct(row, text)),
             'working': right / max(len(lines), row['steps'], 1),
             'complete': float(said.endswith(('.', '!', '?'))),
             'concise': float(bool(said) and len(re.findall(r'[.!?](?:\s|\Z)', said)) <= 1),
             'polite': float(not RUDE.search(text))}
    return {'gold': sum(QUALITY[name] * value for name, value in parts.items())} | parts


def _is_true(line):
    """Whether a line begins with an equation between whole numbers that holds."""
    found = EQUATION.match(line)
    if not found or max(map(len, found.groups(''))) > 12:
        return False
    x, y, result, rest = (int(n or 0) for n in found.group(1, 3, 4, 5))
    if found[2] == '/':
        return y > 0 and (result, rest) == divmod(x, y)
    return not rest and result == {'+': x + y, '-': x - y, '*': x * y}[found[2]]


def visible(text):
    """Text without <think> … </think>, `rendered`, stripped; a <think> that is not closed takes the rest with it."""
    return rendered(re.sub(r'<think>.*?(</think>|\Z)', '', text, flags=re.S)).strip()


def rendered(text):
    """Text with the results of its calls in their places: '= <tool>26 - 19</tool>[7] dollars' -> '= 7 dollars'.

    A call without a result, or one that is not closed, leaves nothing.
    """
    return TOOL.sub(lambda call: call[2] or '', text)


def last_number(text):
    """The last number in a text, exact: '-3', '1,234.50', '$5.', '1.5e3' or '1/2' -> Fraction; None without one."""
    found = [*NUMBER.finditer(text)]
    return _value(found[-1]) if found else None


def gold_number(gold):
    """The number that gold is, exact -> Fraction; None if it is none, or more than a number: '1 1/2', '5 km', '50%',
    '1.234,50'. In GSM8K's solutions it is what follows '####'."""
    found = GOLD.fullmatch(gold.rpartition('####')[2].strip())
    value = _value(found) if found else None
    return value if value or found and not found[3] else None  # '1/0' is none


def _value(found):
    """The value of a match of NUMBER, exact -> Fraction; in '1/0' the last number is 0."""
    if len(found[0]) > 1000 or HUGE.search(found[0]):  # Python refuses to read thousands of digits
        return None
    above, below = (Fraction((part or '1').replace(',', '').replace('−', '-')) for part in found.groups()[1:])
    return (-above if found[1] else above) / below if below else below


def spelled_out(text):
    """A text as `math_answers` reads it: 1500 for '1.5e3', '-' for '−', and a plain number without '$', ',' and '####'.
    """
    if gold_number(text) is not None:
        text = re.sub('[$,]', '', text.rpartition('####')[2])

    def digits(n):
        return n[0] if HUGE.search(n[0]) else format(Decimal(n[0].replace(',', '')), 'f')
    return re.sub(SCIENTIFIC, digits, text.replace('−', '-'))


def decimals_of(number):
    """To how many digits after the point 'math' compares decimals with gold: 6, more if gold is a number below 1."""
    return 6 - int(math.log10(abs(number))) if number and 1e-300 < abs(number) < 1 else 6


def normalise(text):
    """Lower case, without punctuation and the articles, blanks joined: what SQuAD compares (arXiv:1606.05250)."""
    text = text.lower().translate(dict.fromkeys(map(ord, string.punctuation)))
    return ' '.join(re.sub(r'\b(a|an|the)\b', ' ', text).split())


def exact_form(text):
    """What the grader 'exact' compares: the text normalised, or as it is where that leaves nothing ('A', '?'), and the
    marks that its numbers lost: '-5' is not '5'."""
    text = text.replace('−', '-').strip().lower()
    return ' '.join([normalise(text) or text.rstrip('.'), *MARKS.findall(text)])


def token_f1(text, gold):
    """F1 of the words that a text and gold have in common, both normalised (arXiv:1606.05250); 1 if neither has any."""
    said, due = normalise(text).split(), normalise(gold).split()
    common = sum((Counter(said) & Counter(due)).values())
    return 2 * common / (len(said) + len(due)) if said or due else 1.0


def rouge_l(text, gold):
    """ROUGE-L: F1 of the longest common subsequence of words, [a-z0-9]+ in lower case (Lin 2004); 0 where one has none.

    Its length comes row by row of the table, a bit for each word of gold, which is 0 where the row goes up (Hyyrö,
    "Bit-parallel LCS-length computation revisited", 2004).
    """
    said, due = (re.findall('[a-z0-9]+', t.lower()) for t in (text, gold))
    where, row, full = {}, (1 << len(due)) - 1, (1 << len(due)) - 1
    for i, word in enumerate(due):
        where[word] = where.get(word, 0) | 1 << i
    for word in said:
        hits = row & where.get(word, 0)
        row = (row + hits | row - hits) & full
    common = len(due) - row.bit_count()
    return 2 * common / (len(said) + len(due)) if common else 0.0


def grades(row, answer):
    """Grades of an answer: {'exact', 'f1', 'rouge_l'} against the row's last message, unless that is empty, and
    'correct' (see `is_correct`) if the row has an `answer`."""
    gold, said = visible(row['messages'][-1]['content']), visible(answer)
    marks = {'exact': float(normalise(said) == normalise(gold))} if gold else {}  # some prompts have none
    if 'answer' in row:
        marks['correct'] = float(is_correct(row, answer))
    return marks | ({'f1': token_f1(said, gold), 'rouge_l': rouge_l(said, gold)} if gold else {})


def summarise(marks):
    """Grades of many answers -> ({name: mean}, {name: (low, high)} at 95 %), each over the answers that have it."""
    means, ranges = {}, {}
    for name in {name: None for m in marks for name in m}:
        values = [m[name] for m in marks if name in m]
        means[name], ranges[name] = sum(values) / len(values), interval(values)
    return means, ranges


def as_metrics(means, ranges):
    """The result of `summarise` as metrics: {'val/NAME', 'val/NAME_low', 'val/NAME_high'} for each name."""
    return {f'val/{name}{end}': value for name, mean in means.items()
            for end, value in zip(('', '_low', '_high'), (mean, *ranges[name]), strict=True)}


def outcomes(rows, marks):
    """Which answers to rows are correct, as a metric for `compared`: {'correct_by_prompt': '5f3c9e21 0110…'}, the
    prompts' checksum and a digit for each; {} where a row has no gold."""
    if not all('correct' in mark for mark in marks):
        return {}
    prompts = zlib.crc32(repr([row['messages'][:-1] for row in rows]).encode())
    return {'correct_by_prompt': f'{prompts:08x} ' + ''.join(str(int(mark['correct'])) for mark in marks)}


def compared(ours, theirs):
    """Two lists of what `outcomes` keeps of a run -> in words by how much ours are better, prompt by prompt (the mean
    of runs, if there are several); '' where the prompts are not the same."""
    if len({text.split()[0] for text in [*ours, *theirs]}) != 1:
        return ''
    digits = [[text.split()[1] for text in side] for side in (ours, theirs)]
    means = [[sum(map(int, hits)) / len(side) for hits in zip(*side, strict=True)] for side in digits]
    several = max(map(len, digits)) > 1
    return difference([a - b for a, b in zip(*means, strict=True)], 'prompts' + ', of these seeds' * several)


def difference(values, what):
    """Differences between two models, one for each question, in words: with McNemar's exact test where each was right
    or wrong, else with the mean's interval."""
    mean = sum(values) / len(values)
    if set(values) <= {-1, 0, 1}:
        plus, minus = values.count(1), values.count(-1)
        return (f'{mean:+.1%} on {len(values)} {what}: {plus} to {minus} where one alone is right, p = '
                f'{mcnemar(plus, minus):.3g}')
    low, high = interval(values)
    return f'{mean:+.3f} ({low:+.3f} to {high:+.3f}) on {len(values)} {what}'


def accuracy_by(rows, marks, key, name='correct'):
    """The mean grade of this name for each value of a row's key, over the rows that have it, as text."""
    shares = {}
    for row, mark in zip(rows, marks, strict=True):
        if key in row and name in mark:
            shares.setdefault(row[key], []).append(mark[name])
    return ', '.join(f'{k}: {sum(v) / len(v):.0%} of {len(v)}' for k, v in sorted(shares.items(), key=str))


def format_metrics(means, ranges):
    """The result of `summarise` as text."""
    names = {'f1': 'F1', 'rouge_l': 'ROUGE-L'}
    return ', '.join(f'{means[k]:.1%} {names.get(k, k)} ({ranges[k][0]:.1%} to {ranges[k][1]:.1%})' for k in means)


SHOWN = 600  # letters of a prompt in a sample


def format_answer(row, answer, marks):
    """A prompt, the end of it if it is long, the answer, its grade and the gold answer, as text."""
    asked = row.get('prompt', row['messages'][:-1])
    said = [m['content'] or json.dumps(m.get('tool_calls', ''), ensure_ascii=False) for m in asked]
    if len(asked) > 1:
        said = [f'{m["role"]}: {text}' for m, text in zip(asked, said, strict=True)]
    prompt = '\n'.join(said)
    text = f'{prompt if len(prompt) <= SHOWN else "…" + prompt[-SHOWN:]}\n  -> {answer}\n'
    if 'correct' not in marks and 'f1' not in marks:
        return f'{text}  (no gold)'
    verdict = ('right' if marks['correct'] else 'wrong') if 'correct' in marks else f'F1 {marks["f1"]:.2f}'
    return f'{text}  gold ({verdict}): {visible(row["messages"][-1]["content"])}'


def interval(values):
    """The 95 % confidence interval of the mean of values -> (low, high).

    Wilson's interval (1927) if all are 0 or 1, else Student's t, which ends at 0 and 1 where the values do; a single
    value is its own interval.
    """
    n, z, mean = len(values), 1.959964, sum(values) / len(values)
    if set(values) <= {0, 1}:
        middle, half = mean + z * z / (2 * n), z * math.sqrt(mean * (1 - mean) / n + (z / (2 * n)) ** 2)
        return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))
    half = t_quantile(max(1, n - 1)) * math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, n - 1) / n)
    shares = all(0 <= v <= 1 for v in values)
    return (max(0.0, mean - half), min(1.0, mean + half)) if shares else (mean - half, mean + half)


# 97.5 % quantiles of Student's t for 1 to 9 degrees of freedom; from 10 on 1.96 + 2.37 / df + 2.8 / df^2 is as good
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def t_quantile(df):
    """The 97.5 % quantile of Student's t with df degrees of freedom."""
    return STUDENT[df - 1] if df <= len(STUDENT) else 1.96 + 2.37 / df + 2.8 / df ** 2


def mcnemar(only_first, only_second):
    """The two-sided exact p-value of McNemar's test (1947) that two models are right equally often, from on how many of
    the same questions the one alone was right and the other alone: a fair coin's, thrown for each of them."""
    n, ways, total = only_first + only_second, 1, 0
    for k in range(min(only_first, only_second) + 1):
        total += ways  # n over k
        ways = ways * (n - k) // (k + 1)
    return min(1.0, 2 * total / 2 ** n)


def ratio_interval(sums, counts):
    """The 95 % confidence interval of sum(sums) / sum(counts), a loss per token, over rows or batches of any length ->
    (low, high); a single one is its own interval. Linearised (Cochran, Sampling Techniques, 1977, 6.4)."""
    n, total = len(sums), max(1, sum(counts))
    ratio = sum(sums) / total
    if n == 1:
        return ratio, ratio
    squares = sum((x - ratio * count) ** 2 for x, count in zip(sums, counts, strict=True))
    half = t_quantile(n - 1) * math.sqrt(n / (n - 1) * squares) / total
    return max(0.0, ratio - half), ratio + half  # no loss is below 0


def pass_at_k(n, c, k):
    """The chance that of k answers at least one is right, from n of which c are: unbiased (arXiv:2107.03374)."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise UserError(f'pass@{k} of {n} answers, {c} of them right: take k from 1 to {n}')
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def final_answers(row, texts):
    """The final answers in texts, for a vote: the last number of each; by the row's grader 'exact' its words, by 'math'
    the first of the texts that it equals; None where there is none."""
    votes = []
    for text in map(visible, texts):
        if row.get('grader') == 'exact':
            votes.append(exact_form(text) or None)
        elif row.get('grader') == 'math':
            earlier = [vote for vote in dict.fromkeys(votes) if vote is not None]
            votes.append(next((vote for vote in (*earlier, text) if GRADERS['math'](text, vote)), None))
        else:
            votes.append(last_number(text))
    return votes


def majority(votes):
    """Votes in the order sampled -> (index of the first vote for the most frequent one, its count): self-consistency
    (arXiv:2203.11171). None abstains; a tie goes to the one sampled first. (0, 0) if all abstain."""
    counts = Counter(vote for vote in votes if vote is not None)  # keeps the order, and max takes the first
    winner = max(counts, key=counts.get, default=None)
    return (votes.index(winner), counts[winner]) if counts else (0, 0)


def maj_at_k(votes, right, k):
    """The chance that the majority of k answers is right, from n in the order sampled: the fraction of the n // k
    disjoint groups of k adjacent ones whose `majority` is. Unbiased, since each group is a sample of k."""
    if not 1 <= k <= len(votes):
        raise UserError(f'maj@{k} of {len(votes)} answers: take k from 1 to {len(votes)}')
    firsts = range(0, len(votes) - k + 1, k)
    return sum(right[first + majority(votes[first:first + k])[0]] for first in firsts) / len(firsts)


def best_at_k(scores, right, k):
    """The chance that of k answers the one with the highest score is right (arXiv:2009.01325), from n of them: over all
    choices of k, so unbiased. In C(i, k - 1) of them the one with i worse ones wins; of equal scores the first does."""
    n = len(scores)
    if not 1 <= k <= n:
        raise UserError(f'best@{k} of {n} answers: take k from 1 to {n}')
    order = sorted(range(n), key=lambda i: (scores[i], -i))
    return sum(right[i] * math.comb(worse, k - 1) for worse, i in enumerate(order)) / math.comb(n, k)


def at_k_lines(rows, answers, scorer, num_samples):
    """Lines of pass@k, maj@k and, with a scorer, best@k for k = 1, 2, 4 … num_samples, with 95 % intervals."""
    graded = [(row, texts) for row, texts in zip(rows, answers, strict=True) if 'answer' in row]
    correct = [[int(is_correct(row, text)) for text in texts] for row, texts in graded]
    votes = [final_answers(row, texts) for row, texts in graded]
    scores = None
    if scorer:
        scores = scorer([(row['messages'][:-1], text) for row, texts in graded for text in texts])
        scores = scores.reshape(-1, num_samples).tolist()
    lines = []
    for k in [2 ** i for i in range(8) if 2 ** i < num_samples] + [num_samples]:
        shares = {'pass': [pass_at_k(num_samples, sum(hits), k) for hits in correct],
                  'maj': [maj_at_k(vote, hits, k) for vote, hits in zip(votes, correct, strict=True)]}
        if scores:
            shares['best'] = [best_at_k(score, hits, k) for score, hits in zip(scores, correct, strict=True)]
        parts = []
        for name, values in shares.items():
            low, high = interval(values)
            parts.append(f'{name}@{k}: {sum(values) / len(values):.1%} ({low:.1%} to {high:.1%})')
        lines.append(', '.join(parts))
    return lines
