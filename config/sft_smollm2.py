"""LoRA on a real pretrained model, on two cores: SmolLM2-135M-Instruct learns to answer as the rows of a dataset do."""
out_dir = 'out/sft_smollm2'
init_from = 'smollm2'
dataset = 'alpaca'
max_length = 256

lora_rank = 8
lora_alpha = 16.0

batch_size = 2
gradient_accumulation_steps = 4
max_iters = 30
learning_rate = 1e-3
warmup_iters = 4

eval_interval = 30
eval_rows = 0
log_interval = 5
max_new_tokens = 64
