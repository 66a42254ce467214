"""Reading and writing weights: tensors, FSDP shards, safetensors streams, chunks, names."""
