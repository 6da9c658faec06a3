"""GGUF files, llama.cpp's own, as checkpoints: weights, config and tokenizer come from one file."""
