"""The project's runtime beside other ways to change LoRA weights per request: ``python -m bench``."""
