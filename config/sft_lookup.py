"""Questions of a shop, of data/lookup: the model of config/sft_mixed.py learns to call two functions, in turns of
their own."""
out_dir = 'out/sft_lookup'
init_from = 'out/sft_mixed'
dataset = 'lookup'
tools = 'data/lookup/shop.py'
chat_template = 'data/lookup/template.jinja'
block_size = 512

batch_size = 4
max_iters = 400
optimizer = 'muon'
muon_lr = 0.02
learning_rate = 3e-3
embed_lr = 9e-3
weight_decay = 0.0
beta2 = 0.99
grad_clip = 0.0
lr_schedule = 'wsd'
warmup_iters = 10

eval_interval = 400
eval_rows = 100
max_new_tokens = 320
