"""
A model of this project in lm-eval (arXiv:2405.14782, pip install lm-eval): `lm_eval` with one more name for --model.

    python lm_eval_adapter.py --model flatgpt --model_args init_from=out/tiny --tasks arc_easy --limit 200
"""
import sys
from itertools import groupby
from pathlib import Path

import evaluate as judging
from errors import UserError

# lm-eval's tasks import another package `evaluate`, of Hugging Face: they must not find the file of that name here
del sys.modules['evaluate']
sys.path.sort(key=lambda folder: Path(folder or '.').resolve() == Path(__file__).resolve().parent)
try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError:
    print('error: lm-eval is not installed: pip install lm-eval', file=sys.stderr)
    sys.exit(2)


@register_model('flatgpt')
class FlatGPT(LM):
    """model_args: init_from, dtype, quant and fields of GPTConfig."""
    def __init__(self, init_from='out/tiny', device=None, batch_size=None, max_batch_size=None, **options):
        super().__init__()
        judged = judging.Judged(init_from, device or 'auto', **options)
        self.model, self.tokenizer = judged.model, judged.tokenizer

    def score(self, questions):
        found = {i: pairs for some in judging.log_likelihoods(self.model, questions) for i, pairs in some.items()}
        return [pair for i in range(len(questions)) for pair in found[i]]

    def loglikelihood(self, requests, disable_tqdm=False):
        same = groupby([request.args for request in requests], key=lambda pair: pair[0])  # the choices of a question
        return self.score([[judging.encode_pair(self.tokenizer, *pair) for pair in pairs] for _, pairs in same])

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        size = self.model.config.block_size
        texts = [judging.windows(judging.with_start(self.tokenizer, r.args[0]), size, size) for r in requests]
        scores = iter(self.score([[window] for text in texts for window in text]))
        return [sum(next(scores)[0] for _ in text) for text in texts]

    def generate_until(self, requests, disable_tqdm=False):
        options = requests[0].args[1]
        if any(r.args[1] != options for r in requests) or options.get('do_sample'):
            raise UserError('only greedy decoding, with the same options for all requests, is here: run one task')
        n, until = options.get('max_gen_toks', 256), options.get('until', [])
        prompts = [judging.encode_pair(self.tokenizer, r.args[0], '')[0] for r in requests]
        parts = judging.answers(self.model, self.tokenizer, prompts, [until] if isinstance(until, str) else until, n)
        found = {i: text for some in parts for i, text in some.items()}
        return [found[i] for i in range(len(prompts))]


if __name__ == '__main__':
    from lm_eval.__main__ import cli_evaluate
    cli_evaluate()
