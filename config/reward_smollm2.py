"""A reward model on two cores: SmolLM2-135M-Instruct learns with LoRA which answers of a dataset are preferred."""
out_dir = 'out/reward_smollm2'
init_from = 'smollm2'
dataset = 'instructions'
max_length = 256

lora_rank = 8
lora_alpha = 16.0

batch_size = 4
gradient_accumulation_steps = 2
max_iters = 120
learning_rate = 1e-3
warmup_iters = 4

eval_interval = 60
eval_rows = 0
log_interval = 5
