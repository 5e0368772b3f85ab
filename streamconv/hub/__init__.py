"""The Hugging Face Hub: the client, repositories and model cards."""
