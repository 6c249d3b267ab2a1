"""
An answer against its gold: graders, exact match, F1 and ROUGE-L, the quality of a worked solution, pass@k, maj@k and
best@k, and 95 % intervals.

    grade('They pick 58.', '58', 'number')        is it right?
    marks = [grades(row, text) for row, text in zip(rows, answers)]
    means, ranges = summarise(marks)
"""
import math
import re
import string
from collections import Counter
from fractions import Fraction

from chat import CALL
from tokenizer import UserError

# A minus after a word, a number or a bracket takes away from that; commas that set off no thousands separate numbers.
UNSIGNED = r'(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+'
NUMBER = re.compile(rf'((?<![\w)\]}}])[-−])?\$?({UNSIGNED})(?:/({UNSIGNED}))?')
GRADERS = {
    'number': lambda text, gold: (due := last_number(gold)) is not None and last_number(text) == due,
    'exact': lambda text, gold: normalise(text) == normalise(gold),
}


def follows_format(text):
    """Whether a text is one <think> … </think> and then an answer, and nothing else."""
    return bool(re.fullmatch(r'\s*<think>(?:(?!</?think>).)*</think>(?=.*\S)(?:(?!</?think>).)*', text, re.S))


def grade(text, gold, grader):
    """Whether an answer is right: 'number', its last number is that of gold; 'exact', both are the same, normalised.

    Only the `visible` text counts, not the thoughts. UserError for another grader.
    """
    if grader not in GRADERS:
        raise UserError(f'"grader" is {grader!r}, not one of {", ".join(GRADERS)}: fix it in the rows')
    return GRADERS[grader](visible(text), str(gold))


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
    """The true quality of an answer to a word problem, from 0 to 1, and its parts -> {'gold', and the keys of QUALITY}.

    correct: see `is_correct`; working: the fraction of lines between <think> and </think> that are true equations, or
    of the row's `steps` if these are more; complete: it ends as a sentence does; concise: at most one sentence follows
    the working; polite: no word of RUDE. An empty answer is polite and has no other part.
    """
    said = visible(text)
    thoughts = re.findall(r'<think>(.*?)(?:</think>|\Z)', text, re.S)
    lines = [line for thought in thoughts for line in rendered(thought).split('\n') if line]
    right = sum(map(_is_true, lines))
    parts = {'correct': float(is_correct(row, text)),
             'working': right / max(len(lines), row.get('steps', 1), 1),
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
    """The last number in a text, exact: '-3', '1,234.50', '$5.' or '1/2' -> Fraction; None where there is none."""
    found = [*NUMBER.finditer(text)]
    if not found or len(found[-1].group()) > 1000:  # Python refuses to read thousands of digits
        return None
    above, below = (Fraction((part or '1').replace(',', '')) for part in found[-1].groups()[1:])
    return (-above if found[-1][1] else above) / below if below else below  # in '1/0' the last is 0


def normalise(text):
    """Lower case, without punctuation and the articles, blanks joined: what SQuAD compares (arXiv:1606.05250)."""
    text = text.lower().translate(dict.fromkeys(map(ord, string.punctuation)))
    return ' '.join(re.sub(r'\b(a|an|the)\b', ' ', text).split())


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


def format_answer(row, answer, marks):
    """A prompt's last message, the answer, its grade and the gold answer, as text."""
    text = f'{row["messages"][-2]["content"] if len(row["messages"]) > 1 else ""}\n  -> {answer}\n'
    if 'correct' not in marks and 'f1' not in marks:
        return f'{text}  (no gold)'
    verdict = ('right' if marks['correct'] else 'wrong') if 'correct' in marks else f'F1 {marks["f1"]:.2f}'
    return f'{text}  gold ({verdict}): {visible(row["messages"][-1]["content"])}'


def interval(values):
    """The 95 % confidence interval of the mean of values -> (low, high).

    Wilson's interval (1927) if all are 0 or 1, else the normal approximation; a single value is its own interval.
    """
    n, z, mean = len(values), 1.959964, sum(values) / len(values)
    if set(values) <= {0, 1}:
        middle, half = mean + z * z / (2 * n), z * math.sqrt(mean * (1 - mean) / n + (z / (2 * n)) ** 2)
        return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))
    half = z * math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, n - 1) / n)
    return mean - half, mean + half


def pass_at_k(n, c, k):
    """The chance that of k answers at least one is right, from n of which c are: unbiased (arXiv:2107.03374)."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise UserError(f'pass@{k} of {n} answers, {c} of them right: take k from 1 to {n}')
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def final_answer(row, text):
    """The final answer in a text, for a vote: its last number, or its normalised words if the row's grader is 'exact';
    None if there is none."""
    said = visible(text)
    return (normalise(said) or None) if row.get('grader') == 'exact' else last_number(said)


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
    votes = [[final_answer(row, text) for text in texts] for row, texts in graded]
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
