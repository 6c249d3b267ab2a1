"""Four of SmolLM2's thirty layers learn from its answers, to propose tokens to it: sample.py --draft=out/draft.

    python data/alpaca/prepare.py --input=instruction-data.json --name=instructions
"""
out_dir = 'out/draft'
teacher = 'smollm2'
init_from = 'teacher'
n_layer = 4
dataset = 'instructions'
answers = 'teacher'
answers_file = 'out/draft_answers.jsonl'
answer_prompts = 400
max_new_tokens = 64
max_length = 256
batch_size = 4
alpha = 1.0
top_k = 64
cache = 'out/cache_draft'

max_iters = 90
optimizer = 'muon'
muon_lr = 0.01
learning_rate = 1e-3
beta2 = 0.99
lr_schedule = 'wsd'
warmup_iters = 5

eval_interval = 45
eval_rows = 16
