"""LoRA on a real pretrained model, on two cores: SmolLM2-135M-Instruct learns to answer as the rows of a dataset do."""
out_dir = 'out/sft_smollm2'
init_from = 'smollm2'
base = 'smollm2'
dataset = 'alpaca'
max_length = 256

lora_rank = 8
lora_alpha = 16.0

batch_size = 2
max_iters = 120
learning_rate = 1e-3
warmup_iters = 10

eval_interval = 60
eval_rows = 100
max_new_tokens = 64
