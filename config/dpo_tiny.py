"""DPO on two cores: the model of config/sft_tiny.py learns which of two worked solutions to give."""
out_dir = 'out/dpo'
init_from = 'out/sft'
dataset = 'wordproblems'

batch_size = 16
max_iters = 150
learning_rate = 1e-4
beta = 1.0
label_smoothing = 0.1
lr_schedule = 'linear'

eval_interval = 75
eval_rows = 300
max_new_tokens = 96
