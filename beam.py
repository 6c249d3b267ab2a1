"""
Beam search: the likeliest text instead of a drawn one, of a decoder or an encoder-decoder.

    ((ids, score), *others), = beam_search(model, [[1, 2, 3]], max_new_tokens=20, beams=4, stop_ids=(0,))
    python sample.py --init_from=out/reverse --source="stressed" --beams=4

Papers: Attention Is All You Need (arXiv:1706.03762, 6.1: four beams, alpha = 0.6), Google's translation system
(arXiv:1609.08144, 7: the length penalty).
"""
import itertools
import math

import torch

from generate import Batch, Row, check_finite, check_prompts, outgrows_a_window


def normalised(logprob, length, alpha):
    """The score of an answer of so many tokens: its log-probability over ((5 + length) / 6)^alpha (arXiv:1609.08144,
    equation 14). alpha 0: the log-probability itself, which only falls with every token."""
    return logprob / ((5 + length) / 6) ** alpha


@torch.inference_mode()
def beam_search(model, prompts, max_new_tokens, beams=4, length_penalty=0.6, stop_ids=(), vocab_limit=0,
                use_cache=True, sources=None):
    """Continues each of ragged prompts (lists of ids) by the `beams` best answers that it finds -> for each prompt a
    list of (new ids, score), best first; see `normalised`.

    At every step the likeliest `beams` beginnings of an answer go on, each with its cache. One among them that gets a
    token of stop_ids, or its max_new_tokens-th, is finished. A prompt's search ends when it has `beams` finished
    answers and no beginning has a better score, of its own length, than the worst of them: with one beam it is greedy.
    vocab_limit, sources: see `generate.generate`. Raises ValueError as that does.
    """
    if beams < 1 or not 0 <= length_penalty < math.inf or max_new_tokens < 0:
        raise ValueError('beam search needs beams >= 1, a finite length_penalty >= 0 and max_new_tokens >= 0')
    check_prompts(prompts, model.config, sources)
    rolling = outgrows_a_window(model.config, max(map(len, prompts), default=0) + max_new_tokens) and use_cache
    if not prompts or not max_new_tokens:
        return [[([], 0.0)] for _ in prompts]
    was_training = model.training
    model.eval()
    try:
        batch = Batch(model, use_cache, rolling, sources, room=32)  # whose cache is copied at every step: no larger
        batch.admit([Row(prompt, max_new_tokens, [], i, i) for i, prompt in enumerate(prompts)])
        finished, logprobs = [[] for _ in prompts], [0.0] * len(prompts)
        for length in range(1, max_new_tokens + 1):
            logits = batch.advance()
            # log-probabilities of all answers that are a token longer: (rows, V)
            longer = logits.log_softmax(-1) + torch.tensor(logprobs, device=logits.device)[:, None]
            longer = longer[:, :vocab_limit] if vocab_limit else longer
            kept, first = [], 0  # what goes on: (row, token, log-probability)
            for number, rows in itertools.groupby(batch.rows, lambda row: row.number):  # of each prompt, neighbours
                rows = list(rows)
                found = longer[first:first + len(rows)].flatten()
                best = found.topk(min(beams * (1 + len(stop_ids)), len(found)))  # enough that `beams` of them go on
                likeliest, places = best.values.tolist(), best.indices.tolist()
                check_finite(likeliest[:1], temperature=0)  # where nan would be
                going = []
                for rank, (logprob, place) in enumerate(zip(likeliest, places, strict=True)):
                    parent, token = divmod(place, longer.shape[1])
                    if token not in stop_ids and length < max_new_tokens:
                        going.append((first + parent, token, logprob))
                    elif rank < beams:
                        score = normalised(logprob, length, length_penalty)
                        finished[number].append(([*rows[parent].answer, token], score))
                finished[number] = sorted(finished[number], key=lambda answer: -answer[1])[:beams]
                if going and (len(finished[number]) < beams
                              or normalised(going[0][2], length, length_penalty) > finished[number][-1][1]):
                    kept += going[:beams]
                first += len(rows)
            if not kept:
                break
            parents, ids, logprobs = map(list, zip(*kept, strict=True))
            batch.fork(parents, ids)
        return finished
    finally:
        model.train(was_training)
