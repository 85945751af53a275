"""Model folders in and out: Hugging Face safetensors, Orbax, and one embedded model."""
